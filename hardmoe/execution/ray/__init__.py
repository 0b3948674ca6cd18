"""The Ray backend: the only place of this package where ray is imported."""
