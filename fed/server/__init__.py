"""The server: the round loop, the state that it writes after each round, and a round's metrics.

`loop` goes through a round and checks each update before a method sees it; `round_state` is what
it writes; `round_metrics` makes the line of rounds.jsonl, and `heldout` the measures in it.
"""
