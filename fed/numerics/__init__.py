"""Mathematics that knows no method: layers, chunks, joint basis, low rank, least squares."""
