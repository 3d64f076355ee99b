"""Merging: several aligned models in, one out. `python -m fed.merge` is the command.

`run` goes through it all. A model of any form on disk is a `Source`; a `Format` has the tensors of
all sources in groups, one layer or the whole projector each; `merge_group` calls the method on a
group; the format writes the result in the form of the experts, with merge.json and a model card.
"""
