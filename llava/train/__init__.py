"""Training: arguments, data, trainer, entry."""
