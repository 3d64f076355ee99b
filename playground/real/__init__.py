"""The bed of real parts: a language model and a vision network that others trained on the world."""
