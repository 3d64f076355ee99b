"""Formats of a merge: the tensors that it goes through and the folder that it fills."""
