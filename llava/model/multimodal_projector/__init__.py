"""Connectors: what turns picture features into tokens of the language model."""
