"""Clients cut out of one data set: `python -m fed.data`."""
