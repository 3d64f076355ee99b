"""Pilot; `method.py` says what it is."""
