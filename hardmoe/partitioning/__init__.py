"""Partitioning: exact, order-free k-means over features, and the router that comes of it."""
