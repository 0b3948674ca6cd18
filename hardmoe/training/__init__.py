"""The one training loop that the trunk, the experts and the dense baseline share, and what it stands on."""
