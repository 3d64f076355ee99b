"""Fed-CMP; `method.py` says what it is."""
