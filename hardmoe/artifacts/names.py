"""Names of artifacts that more than one package knows."""

DENSE = "baselines/dense"
"""The dense baseline."""


def expert_name(expert: int) -> str:
    """`expert-0007`: an expert's artifact in the directory of its mixture's experts, its unit, its place in the report."""
    return f"expert-{expert:04d}"
