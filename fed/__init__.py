"""Federated training and merging of LLaVA: what travels is the part that trains.

At the root are the commands (`train`, `merge`, `evaluate`, `report`, `gallery`, `personalise`),
their flags (`arguments`) and what is refused before anything is loaded (`validation`). The rooms:

    clients   clients.yaml; a client's task and its update; what a client keeps to itself
    drivers   how a client's task is run: in this process, as a script, or on another machine
    remote    what driver and sites know of each other: requests and answers, and couriers
    site      the process on another machine that trains when it is asked
    server    the round loop, which checks the updates and writes the state after each round
    methods   one file, one way to make one state out of several
    numerics  the mathematics that methods share
    privacy   sums of clients' vectors that show the server no single one
    merging   one merge of finished models, by the same methods
    data      clients cut out of one data set

and imports point down: commands and site, then server, drivers, remote and merging, then clients
and methods, then numerics and privacy, then `llava`. What passes between this package and `llava`
is the state of the trainable part: a flat dict of named tensors, the same one that lies on disk as
`mm_projector.bin`.
"""
