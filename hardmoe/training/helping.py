"""A helper of a team: computes the gradient of its share of every batch that its leader takes; see `team`."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from hardmoe.data.loader import ExampleSet, TrainingBatch
from hardmoe.data.shared_examples import SharedPixels
from hardmoe.training.determinism import deterministic
from hardmoe.training.losses import build_loss
from hardmoe.training.step import Gradients
from hardmoe.training.team import Seat, TeamJob, joined, share_step, sum_losses, unpack


def assist(seat: Seat, job: TeamJob, pixels: SharedPixels, orders: Connection) -> None:
    """A helper's life: a gradient for every step that it is told, until the leader ends or dies."""
    # Whoever stops a unit stops its leader, which makes a checkpoint first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    try:
        _follow(seat, job, pixels.put_into(job.examples), orders)
    except Exception:  # noqa: BLE001 - told to the leader, whose own words on it would be that somebody is gone
        with suppress(OSError):
            orders.send(traceback.format_exc())
        os._exit(1)


def _end_with(leader: BaseProcess | None) -> None:
    """End this process when its leader has died, whatever it waits for."""
    assert leader is not None
    leader.join()
    os._exit(0)


def _follow(seat: Seat, job: TeamJob, examples: ExampleSet, orders: Connection) -> None:
    model, teacher = unpack(job.networks)
    model = model.to(seat.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = build_loss(job.config, examples, model.decoder.out_features, job.seed, seat.device)
    teacher = None if teacher is None else teacher.on(seat.device)
    gradients = Gradients(model.train(), loss, job.config, job.seed, seat.device, teacher)
    with deterministic(job.config.num_threads, seat.device), joined(seat):
        for step, batch in _steps(job, examples, orders):
            model.zero_grad()
            with share_step(model):
                mine = gradients.add(batch, step, seat)
            sum_losses(mine)


def _steps(job: TeamJob, examples: ExampleSet, orders: Connection) -> Iterator[tuple[int, TrainingBatch]]:
    """The batches of the steps to help with, which follow one another unless the leader has gone back."""
    schedule = examples.schedule(job.config.batch_size, job.config.epochs, job.seed, job.config.repeat_threshold)
    expected, batches = -1, examples.training_batches(schedule, schedule.total_steps)
    while (step := _next_order(orders)) is not None:
        if step != expected:
            batches = examples.training_batches(schedule, step)
        yield step, next(batches)
        expected = step + 1


def _next_order(orders: Connection) -> int | None:
    """The step to help with; None when there is none any more."""
    try:
        return int(orders.recv())
    except EOFError:
        return None
