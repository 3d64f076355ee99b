"""Clients: what clients.yaml says of them, and which of their samples each round sees."""
