"""The recipe's `evaluation` section."""

from pydantic import Field

from hardmoe.config import Config, added


class EvaluationConfig(Config):
    """Which controls are trained, and how finely the intervals are estimated."""

    dense_baseline: bool = True
    """Train one network on all the data with the same number of examples seen, and refit its decoder: the controls."""

    random_partition: bool = False
    """Also train a mixture on a random partition: what the clustering itself is worth. Costs as much as the mixture."""

    top_k: int | None = added(None, ge=2)
    """Also judge `mixture_topk`: every image through so many of its nearest experts, mixed by distance, with the sharpness fitted
    on the validation split. Costs as many expert passes an image, where the mixture costs one; null for not."""

    bootstrap_replicates: int = Field(default=1000, ge=1)
    """Poisson bootstrap replicates behind the 95 % intervals of the ranking metrics."""

    map_replicates: int = Field(default=100, ge=1)
    """Replicates behind the interval of `map`, which costs a pass over all scores for each of them."""
