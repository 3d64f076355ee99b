"""Drivers: ways to run a client's task."""
