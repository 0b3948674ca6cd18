"""The recipe's `evaluation` section."""

from pydantic import Field

from hardmoe.config import Config


class EvaluationConfig(Config):
    """Which controls are trained, and how finely the intervals are estimated."""

    dense_baseline: bool = True
    """Train one network on all the data with the same number of examples seen, and refit its decoder: the controls."""

    random_partition: bool = False
    """Also train a mixture on a random partition: what the clustering itself is worth. Costs as much as the mixture."""

    bootstrap_replicates: int = Field(default=1000, ge=1)
    """Poisson bootstrap replicates behind the 95 % intervals of the ranking metrics."""

    map_replicates: int = Field(default=100, ge=1)
    """Replicates behind the interval of `map`, which costs a pass over all scores for each of them."""
