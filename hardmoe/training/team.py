"""One network on several devices of a machine: each computes the gradient of a share of every batch.

The unit's own process leads. It holds all that a training is: weights, optimiser, average, checkpoints, what the validation
said. Every further device has a helper, a process that knows the examples and a copy of the network and keeps nothing from one
step to the next: before a step it is sent the parameters that train and the buffers, afterwards its gradient is added to the
leader's, which alone takes the step. Parameters out and gradients in are as many bytes as the usual all-reduce; and since helpers
have no state, resuming, going back after a lost loss, early stops and averages are those of one device, without a line of their
own. Decoded images are shared through a file of no name, which the system pages.

A batch is drawn, augmented and mixed whole by everybody and then divided, and batch normalisation is over the whole batch
(see `shared_batch_norm`): so the number of devices changes nothing but the order of sums, save for dropout, whose masks the
shares have in common. A helper that dies fails the unit's try, which begins again at the last checkpoint; one whose leader
dies ends itself.

Rejected: Ray Train, whose controller, placement group and worker group take tens of seconds to start for every expert, put the
loop's state into every worker, and leave nothing for runs without Ray; and torch's DistributedDataParallel, which hides the
sums behind the backward pass but wants an optimiser, and so all state, in every process.

Shape letters: B batch, S side in pixels, V tags.
"""

import io
import logging
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, distributed, nn

from hardmoe.data.loader import ExampleSet
from hardmoe.data.shared_examples import SharedPixels, without_pixels
from hardmoe.errors import WorkerLostError
from hardmoe.models.backbones import TagClassifier
from hardmoe.training.config import TrainingConfig
from hardmoe.training.distillation import Teacher
from hardmoe.training.shared_batch_norm import shared_batch_norm

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(minutes=10)
"""How long one process waits for another within a step."""
_LAST_WORDS_SECONDS = 5.0


@dataclass(frozen=True)
class TeamJob:
    """What a helper must know to compute a gradient."""

    networks: bytes
    """The network before the first step, and its teacher; see `pack`."""
    examples: ExampleSet
    """Those that the training shows, all with labels."""
    config: TrainingConfig
    seed: int


def pack(model: TagClassifier, teacher: Teacher | None) -> bytes:
    """Networks to be sent to a helper.

    As bytes, since torch moves whatever tensor it sends to another process into memory that both write to.
    """
    torch.save((model, teacher), packed := io.BytesIO())
    return packed.getvalue()


def unpack(networks: bytes) -> tuple[TagClassifier, Teacher | None]:
    """What the leader of this very process has packed: nothing that was ever on a disk or came from elsewhere."""
    model, teacher = torch.load(io.BytesIO(networks), weights_only=False)
    return model, teacher


@dataclass(frozen=True)
class Seat:
    """Where a process sits in its team."""

    rank: int
    device: torch.device
    meeting_place: str
    """The file through which the processes find each other."""
    size: int

    def share_of(self, rows: Tensor) -> Tensor:
        """This process's rows of a whole batch."""
        return rows.tensor_split(self.size)[self.rank]


class Team:
    """The leader's side: as a context, it starts the helpers and ends them."""

    def __init__(self, job: TeamJob, devices: Sequence[torch.device]) -> None:
        self._job = job
        self._devices = devices
        self._orders: list[Connection] = []
        self._helpers: list[BaseProcess] = []
        self._stack = ExitStack()

    @property
    def size(self) -> int:
        """Processes, the leader among them."""
        return len(self._devices)

    def __enter__(self) -> "Team":
        with self._stack as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="hardmoe-team-"))
            self._seat, *others = (Seat(rank, each, f"{place}/meeting", self.size) for rank, each in enumerate(self._devices))
            pixels = stack.enter_context(SharedPixels.of(self._job.examples, Path(tempfile.gettempdir())))
            stack.callback(self._end)
            for seat in others:
                self._start(seat, pixels)
            stack.enter_context(joined(self._seat))
            logger.info("every batch is divided among %d devices, with a process for each", self.size)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _start(self, seat: Seat, pixels: SharedPixels) -> None:
        from hardmoe.training.helping import assist

        # Forking is out of the question: the leader may have CUDA, Ray and threads running.
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        job = replace(self._job, examples=without_pixels(self._job.examples))
        helper = context.Process(target=assist, args=(seat, job, pixels, theirs), name=f"helper-{seat.rank}", daemon=True)
        helper.start()
        theirs.close()
        self._orders.append(mine)
        self._helpers.append(helper)

    def _end(self) -> None:
        for order in self._orders:
            order.close()
        for helper in self._helpers:
            helper.join(_LAST_WORDS_SECONDS)
            helper.kill()
            helper.join()

    def is_needed_for(self, batch_size: int) -> bool:
        """Whether everybody would have something to do."""
        return batch_size >= self.size

    @contextmanager
    def step(self, step: int, model: nn.Module) -> Iterator["Seat"]:
        """Within the block the leader computes the gradient of its own share; afterwards it has everybody's, summed.

        Raises:
            WorkerLostError: a helper has died.
        """
        try:
            for order in self._orders:
                order.send(step)
            with share_step(model):
                yield self._seat
        except (RuntimeError, OSError) as error:
            self._explain(error)
            raise

    def _explain(self, error: Exception) -> None:
        """Raise what a helper has died of, if one has."""
        for rank, (order, helper) in enumerate(zip(self._orders, self._helpers, strict=True), start=1):
            helper.join(_LAST_WORDS_SECONDS)
            with suppress(EOFError, OSError):
                if order.poll():
                    logger.error("%s", words := str(order.recv()))
                    raise RuntimeError(f"on device {rank + 1} of {self.size}: {words.strip().splitlines()[-1]}") from error
            if helper.exitcode is not None:
                raise WorkerLostError(
                    f"the process of device {rank + 1} of {self.size} died with exit code {helper.exitcode}"
                ) from error


@contextmanager
def joined(seat: Seat) -> Iterator[None]:
    """Be one of the processes that can talk to one another; they are of one machine, and talk within it."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    if seat.device.type == "cuda":
        torch.cuda.set_device(seat.device)
    backend = "cpu:gloo,cuda:nccl" if seat.device.type == "cuda" else "gloo"
    store = distributed.FileStore(seat.meeting_place, seat.size)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.size, timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def share_step(model: nn.Module) -> Iterator[None]:
    """What all processes do around a gradient: begin with the leader's parameters, end with the sum of the gradients in it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _send([*parameters, *(buffer for buffer in model.buffers() if buffer.is_floating_point())])
    with shared_batch_norm(model):
        yield
    _sum_gradients(parameters)


def sum_losses(share: Tensor) -> Tensor:
    """The sum of all processes' shares, in the leader; called by all of them."""
    total = share.clone()
    distributed.reduce(total, 0)
    return total


def _send(state: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in state])
    distributed.broadcast(flat, 0)
    if distributed.get_rank() > 0:
        with torch.no_grad():
            for tensor, piece in zip(state, _pieces(flat, state), strict=True):
                tensor.copy_(piece.view(tensor.shape))


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.reduce(flat, 0)
    if distributed.get_rank() == 0:
        for parameter, gradient, piece in zip(parameters, gradients, _pieces(flat, gradients), strict=True):
            parameter.grad = gradient.copy_(piece.view(gradient.shape))


def _pieces(flat: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """A tensor of one dimension in pieces as long as these tensors."""
    return flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call, no-any-return]
