"""The `execution` section of a recipe: where and how to compute, never what."""

from typing import Literal

from hardmoe.config import Config, operational


class ExecutionConfig(Config):
    """Where units run. No field of this section enters a fingerprint."""

    backend: Literal["ray", "inline"] = operational("ray")
    """`ray` runs units as Ray tasks; `inline` one after the other in the driver, without Ray."""
    address: str = operational("local")
    """`local` starts a Ray of our own on this machine; otherwise the address of a running cluster."""
    parallel: int | None = operational(None, ge=1)
    """At most so many units at a time; null for as many as fit. `--parallel` overrides it."""
    attempts: int = operational(3, ge=1)
    """How often a unit may lose its worker or machine, without a new checkpoint in between, before it counts as failed."""
