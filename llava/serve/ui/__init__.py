"""The web page's parts: a tab each, and what they have in common."""
