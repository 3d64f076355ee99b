"""Clients: clients.yaml, the samples of a round, a task and its update, and private parameters."""
