"""Real pictures and small frozen parts to try everything on."""
