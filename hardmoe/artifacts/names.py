"""Names of artifacts that more than one package knows."""

DENSE = "baselines/dense"
"""The dense baseline."""
ROUNDS = "rounds/"
"""Where the mixtures of all rounds but the last are, each in a directory of its own."""


LIMITS = "abstention/limits"
"""How far from every centroid an image may be to be answered."""
TRANSFER = "transfer/"
"""Where everything about a second dataset is, its images and what the networks say of them."""


def expert_name(expert: int) -> str:
    """`expert-0007`: an expert's artifact in the directory of its mixture's experts, its unit, its place in the report."""
    return f"expert-{expert:04d}"


def is_of_the_mixture(name: str) -> bool:
    """Whether an artifact is an expert of the recipe's own mixture, of whatever round."""
    return name.startswith("experts/") or (name.startswith(ROUNDS) and "/experts/" in name)
