"""What `hardmoe status` says of trainings: how each one stands, and when the last expert will be done."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from hardmoe.config import Json
from hardmoe.execution.tracked import format_seconds


def training_notes(progress: Mapping[str, Json]) -> list[str]:
    """Step, loss, held-out precision, speed, host and tries of the training that a running artifact is; none of another one."""
    live = progress.get("running", {})
    if len(live) != 1:
        return []
    (body,) = live.values()
    values, notes = body["values"], []
    if "step" not in values:
        return []
    notes.append(f"step {values['step']:,}/{body['total']:,.0f}")
    if "loss" in values:
        notes.append(f"loss {values['loss']:.3f}")
    if "precision@1" in values:
        notes.append(f"precision@1 {100 * values['precision@1']:.1f} %")
    notes.append(f"{values['examples/s']:,.0f} examples/s")
    if "computing" in values:
        notes.append(f"{100 * values['computing']:.0f} % of a bare loop's")
    notes.append(str(body["host"]))
    if (tries := body.get("tries", 1)) > 1:
        notes.append(f"try {tries}")
    return notes


def experts_line(
    shown: Mapping[str, float], fractions: Mapping[str, float], speeds: Mapping[str, float], now: datetime
) -> str | None:
    """How far all experts are together, and when the last will be done at the present speed; None where none is being trained.

    Args:
        shown: how many images each expert is shown in all.
        fractions: how much of each artifact is done, 0 to 1.
        speeds: examples/s of those that run.
        now: the local time.
    """
    running = [speeds[name] for name in shown if name in speeds]
    if not running:
        return None
    done = sum(fractions[name] == 1.0 for name in shown)
    speed = sum(running)
    line = f"experts: {done} of {len(shown)} done, {len(running)} running at {speed:,.0f} examples/s together"
    if speed <= 0:
        return line
    seconds = sum(images * (1 - fractions[name]) for name, images in shown.items()) / speed
    end = now + timedelta(seconds=seconds)
    when = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%H:%M on %Y-%m-%d}"
    return f"{line}; the last one done in about {format_seconds(seconds)}, at {when}"
