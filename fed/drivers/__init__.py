"""How a client's work is run."""
