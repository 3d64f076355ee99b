"""The server: the round loop, what it keeps on disk, and what it tells of a round."""
