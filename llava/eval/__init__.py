"""Evaluation entries with upstream's flags and file formats."""
