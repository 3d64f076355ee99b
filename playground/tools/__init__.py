"""The tools that made the playground's data and frozen parts, and that unpack them."""
