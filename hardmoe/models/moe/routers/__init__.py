"""From scores to a `Routing`. A router knows nothing of experts' insides and of how items get there."""
