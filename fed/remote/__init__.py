"""Clients on other machines: requests and answers as files, and what carries them."""
