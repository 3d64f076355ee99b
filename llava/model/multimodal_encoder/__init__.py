"""Vision towers: frozen encoders that give feature vectors of a picture, as of its patches."""
