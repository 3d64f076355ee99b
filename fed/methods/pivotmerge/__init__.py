"""PivotMerge; `method.py` says what it is."""
