"""Federated pre-training of projectors: clients, rounds, methods, merging.

What passes between this package and `llava` is one thing, the state of the trainable part: a flat
dict of named tensors, the same one that lies on disk as `mm_projector.bin`.
"""
