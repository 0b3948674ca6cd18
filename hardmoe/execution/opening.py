"""The backend that an `execution` section names. Ray is imported when it is opened and not before."""

from collections.abc import Callable

from hardmoe.execution.backend import Backend
from hardmoe.execution.config import ExecutionConfig


def open_backend(config: ExecutionConfig, say: Callable[[str], None] = lambda text: None) -> Backend:
    """Make it; `say` is told what is about to be waited for."""
    if config.backend == "inline":
        from hardmoe.execution.inline import InlineBackend

        return InlineBackend()
    from hardmoe.execution.ray.backend import RayBackend

    say("starting Ray on this machine" if config.address == "local" else f"joining the Ray cluster at {config.address}")
    return RayBackend(config.address)
