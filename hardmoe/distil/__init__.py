"""The distilled network: one dense network that learns what the finished mixture says."""
