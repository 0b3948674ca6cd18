"""Features: what the trunk says of every image."""
