"""The server's mixture as a Ray Serve application: gates and holders of experts as deployments, behind the same HTTP door.

`hardmoe serve --address` starts the application, answers HTTP itself as it does without Ray, and takes the application away
again. A replica of `experts` holds as many experts as a budget of memory lets it (Serve's model multiplexing: a request goes to a
replica that has its expert already); both deployments grow and shrink with the requests under way. A replica that died or hangs
is replaced by Serve; what was with it is asked again, so whoever waits only waits longer. One that shrinks away first answers.

Rejected: Serve's own HTTP proxies as the door. Their address, time limits and tokens belong to the whole cluster and not to an
application, they run where the cluster's head is and not where the command was given, and they hold a connection that sends
nothing for ever; so the application has no route there. Rejected as well: Serve's retry of whole HTTP requests, as it has none.

Shape letters: N images, n some of them, S side in pixels, D features.
"""

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hardmoe.artifacts.names import expert_name
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.errors import BackendError, RecipeError
from hardmoe.execution.ray.connection import init, living_nodes, own_ray, prepare_environment, reason
from hardmoe.execution.ray.interrupts import interrupts_held_back
from hardmoe.execution.ray.scratch import make_scratch
from hardmoe.mixture import Judged, Mixture, UseOptions
from hardmoe.serving.engine import MOST_WAITING, BusyError, Found, refuse_beyond
from hardmoe.serving.replicas import Features, Gate, Holder, Travelling
from hardmoe.storage import open_storage

Result = TypeVar("Result")

_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.1
"""Before the second attempt; twice as long before each further one. Serve needs a moment to see that a replica is gone."""
_ASK_SECONDS = 5.0
_DRAIN_SECONDS = 60.0
_HEALTH_PERIOD_SECONDS, _HEALTH_TIMEOUT_SECONDS = 5.0, 30.0
_UP_SECONDS, _DOWN_SECONDS = 5.0, 120.0
"""Of too many, or too few, requests before there are other replicas; a replica takes some ten seconds to start."""
_GATE_REQUESTS, _HOLDER_REQUESTS = 32, 8
"""Under way at a replica, beyond which there should be another. A gate's requests have an image or more, half a batch of them; a
holder's come from batches of gates."""
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
_GPU_SHARES = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class ReplicaOptions:
    """How far the application may grow."""

    root: str
    """The run's, as the cluster's nodes see it."""
    replicas: int | None = None
    """At most so many gates, and as many holders of experts; None for as many as there are CPUs or GPUs for."""
    memory_gib: float | None = None
    """What experts may take in each replica, in GiB; None for no limit."""
    coverage: float | None = None
    """As `UseOptions.coverage`."""


def most_experts(store: ArtifactStore, memory_gib: float | None) -> int:
    """How many experts fit a budget, one at least; -1, as Serve has it, for no limit. All are as large as the first."""
    if memory_gib is None:
        return -1
    record = store.get(f"experts/{expert_name(0)}").record
    size = max(entry.size for entry in record.files if entry.path.endswith(".safetensors"))
    return max(1, int(memory_gib * 2**30 // size))


def gpu_share(num_gpus: float, num_replicas: int) -> float:
    """The part of a GPU that each replica has: a whole one if there are as many; 0 without any."""
    if num_gpus <= 0:
        return 0.0
    return next((share for share in _GPU_SHARES if share * num_replicas <= num_gpus), _GPU_SHARES[-1])


def application(options: ReplicaOptions, replicas: int, share_of_gpu: float) -> Any:
    """The application, for `serve.run`; its handle has `embed`.

    Args:
        options: how far it may grow.
        replicas: at most so many of either deployment.
        share_of_gpu: of each replica.
    """
    from ray import serve

    store = ArtifactStore(open_storage(options.root))
    use = UseOptions(device="cuda" if share_of_gpu else "cpu", coverage=options.coverage)

    def deployment(name: str, target: int) -> Any:
        scaling = {"min_replicas": 1, "max_replicas": replicas, "target_ongoing_requests": target}
        return serve.deployment(
            name=name,
            autoscaling_config=scaling | {"upscale_delay_s": _UP_SECONDS, "downscale_delay_s": _DOWN_SECONDS},
            max_ongoing_requests=8 * target,
            ray_actor_options={"num_cpus": 1, "num_gpus": share_of_gpu},
            health_check_period_s=_HEALTH_PERIOD_SECONDS,
            health_check_timeout_s=_HEALTH_TIMEOUT_SECONDS,
            graceful_shutdown_timeout_s=_DRAIN_SECONDS,
            graceful_shutdown_wait_loop_s=0.5,
        )

    class Experts:
        """Serve's side of a `Holder`."""

        def __init__(self) -> None:
            self._holder = Holder(Mixture(ArtifactStore(open_storage(options.root)), use))

        @serve.multiplexed(max_num_models_per_replica=most_experts(store, options.memory_gib))  # type: ignore[untyped-decorator]
        async def network(self, number: str) -> Any:
            return await self._holder.load(int(number))

        async def num_held(self) -> int:
            return self._holder.num_held

        async def features(self, images: Travelling) -> Features:
            number = serve.get_multiplexed_model_id()
            return await self._holder.features(int(number), await self.network(number), images)

        def check_health(self) -> None:
            self._holder.check_health()

    class Gates:
        """Serve's side of a `Gate`."""

        def __init__(self, experts: Any) -> None:
            async def ask(number: int, images: Travelling) -> Features:
                chosen = experts.options(multiplexed_model_id=str(number))
                found: Features = await persistently(lambda: chosen.features.remote(images))
                return found

            self._gate = Gate(Mixture.load(options.root, use), ask)

        async def embed(self, pixels_N3SS: NDArray[np.uint8]) -> tuple[Judged, Features]:
            return await self._gate.embed(pixels_N3SS)

        def check_health(self) -> None:
            self._gate.check_health()

    experts = deployment("experts", _HOLDER_REQUESTS)(Experts).bind()
    return deployment("gates", _GATE_REQUESTS)(Gates).bind(experts)


async def persistently(call: Callable[[], Awaitable[Result]]) -> Result:
    """What a replica answers; asked again where it is gone. An exception of the code or of the data is not asked for twice.

    Raises:
        BusyError: replicas died time and again.
    """
    from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
    from ray.serve.exceptions import RayServeException

    for attempt in range(_ATTEMPTS):
        try:
            return await call()
        except (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, RayServeException) as error:
            if attempt + 1 == _ATTEMPTS:
                raise BusyError(f"no replica answers ({reason(error)}); try again in a moment") from error
            await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError


class ReplicaEngine:
    """See `Engine`: replicas find experts and features, the alignment is done here.

    Args:
        mixture: the mixture, of which only the decoder is loaded.
        gates: Serve's handle of the gates.
        experts: Serve's handle of the holders of experts.
        most_waiting: images being answered; more are refused.
    """

    def __init__(self, mixture: Mixture, gates: Any, experts: Any, most_waiting: int = MOST_WAITING) -> None:
        self._mixture, self._gates, self._experts, self._most_waiting = mixture, gates, experts, most_waiting
        self._num_waiting = 0

    async def embed(self, pixels_N3SS: NDArray[np.uint8]) -> Found:
        """See `Engine`."""
        refuse_beyond(self._most_waiting, self._num_waiting + len(pixels_N3SS))
        self._num_waiting += len(pixels_N3SS)
        try:
            judged, features_ND = await persistently(lambda: self._gates.embed.remote(pixels_N3SS))
        finally:
            self._num_waiting -= len(pixels_N3SS)
        return await asyncio.to_thread(self._aligned, judged, features_ND)

    async def num_held(self) -> int:
        """See `Engine`."""

        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            found = await self._experts.broadcast("num_held").results_async(timeout_s=_ASK_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:
            return 0
        return sum(each for each in found if isinstance(each, int))

    def _aligned(self, judged: Judged, features_ND: Features) -> Found:
        # A copy, as arrays that Ray passes on cannot be written to, which torch does not know.
        unified_NZ = self._mixture.align(torch.from_numpy(np.array(features_ND)), judged.experts_N)
        return Found(np.array(judged.experts_N), np.array(judged.refused_N), unified_NZ)


@contextmanager
def on_ray(address: str, options: ReplicaOptions, name: str) -> Iterator[tuple[Any, Any]]:
    """The application until the block ends, on a Ray of our own (`local`) or a cluster; handles of gates and of experts.

    What is left of an application of that name, whose door was killed, is replaced. Serve itself stays where it was there before.

    Raises:
        BackendError: there is no Ray, it does not let this driver in, or replicas do not start on it.
    """
    with _joined(address, 2 * (options.replicas or 1)):
        import ray
        from ray import serve

        with interrupts_held_back():
            before = serve.status()
            serve.start(proxy_location="Disabled", logging_config=_QUIET)
        try:
            with interrupts_held_back():
                gates = _deployed(options, name)
                handles = gates, serve.get_deployment_handle("experts", name)
            yield handles
        finally:
            # A Ray that is gone has taken it along.
            with interrupts_held_back(), suppress(ray.exceptions.RayError, serve.exceptions.RayServeException):
                serve.delete(name)
                # On a Ray of our own, Serve ends with it, and without Ray's complaints about its controller.
                if address != "local" and not (before.proxies or before.applications or serve.status().applications):
                    serve.shutdown()


def _deployed(options: ReplicaOptions, name: str) -> Any:
    from ray import serve

    nodes = living_nodes()
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    replicas = options.replicas or max(1, int(gpus or cpus) // 2)
    try:
        app = application(options, replicas, gpu_share(gpus, 2 * replicas))
        return serve.run(app, name=name, route_prefix=None, logging_config=_QUIET)
    except (RuntimeError, TimeoutError) as error:
        told = serve.status().applications.get(name)
        problem = reason(error) if told is None else _last_line(told)
        raise BackendError(
            f"the replicas do not start ({problem}); every node of the cluster must have hardmoe, and see the run {options.root}"
        ) from error


def _last_line(application: Any) -> str:
    """What a deployment that failed says of it: the exception at the end of a traceback."""
    said: list[str] = [each.message for each in application.deployments.values() if each.message] or [application.message]
    return [line.strip() for line in said[0].strip().splitlines() if line.strip()][-1]


@contextmanager
def _joined(address: str, num_cpus: int) -> Iterator[None]:
    """Be a driver of the cluster, or of a Ray of our own with so many CPUs, until the block ends."""
    prepare_environment(joins=address != "local")
    try:
        import ray
        from ray import serve  # noqa: F401 - to know before anything starts
    except ImportError as error:
        raise RecipeError(
            f"serving on Ray needs a package that is missing ({error.name}); pip install 'hardmoe[cluster]'"
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    scratch = make_scratch() if address == "local" else None
    try:
        with interrupts_held_back():
            init(address, options if scratch is None else options | own_ray(num_cpus, scratch))
        yield
    finally:
        with interrupts_held_back():
            ray.shutdown()
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
