"""Vision towers: frozen encoders that give one feature vector per patch."""
