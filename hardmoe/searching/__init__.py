"""Nearest neighbours in the unified space: an index over embeddings, and what is asked of it."""
