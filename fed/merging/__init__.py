"""Merging: several aligned models in, one out. `python -m fed.merge` is the way in.

A model of any form on disk is a `Source`. Its tensors, by upstream's names, go through `core`
group by group: all of a projector at once, a whole model layer by layer. What comes out is written
in the form of the experts by `writing`, `copying` and `lora`, with a card.
"""
