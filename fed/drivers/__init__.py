"""Drivers: how the work of a client in a round is run."""
