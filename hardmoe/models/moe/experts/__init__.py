"""What runs on the items that were sent to it."""
