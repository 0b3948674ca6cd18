"""How far one artifact is, from its units' completions and from what the running ones say; no files, no terminal."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from hardmoe.artifacts.provenance import now
from hardmoe.config import Json


@dataclass
class Tracked:
    """The progress of an artifact being built."""

    started: float = field(default_factory=time.monotonic)
    state: str = "running"
    phase: str = ""
    done: int = 0
    """Complete units of the present phase."""
    total: int = 0
    live: dict[str, dict[str, Json]] = field(default_factory=dict)
    """What running units last said, by unit."""
    failures: list[dict[str, str]] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)
    """How often this driver has handed a unit over, by unit."""
    _phase_started: float = field(default_factory=time.monotonic)
    _given: float = 0.0
    """Units, and shares of units, that were done when this driver first looked: no measure of its speed."""
    _known: set[str] = field(default_factory=set)
    _waits: bool = False
    """Whether it had nothing handed over when it was last looked at."""
    _waited: float = 0.0
    """Seconds of this phase in which that was so: no measure of its speed either."""
    _looked: float = field(default_factory=time.monotonic)

    def follow(self, phase: str, done: int, total: int) -> None:
        """Take in how many units of which phase are complete."""
        if self.phase != phase:
            self.phase, self._given, self.live, self._known = phase, done, {}, set()
            self._begin_to_measure()
        self.done, self.total = done, total
        if done == total:
            self.live = {}

    def hear(self, unit: str, body: dict[str, Json]) -> None:
        """Take in what a running unit says; one that resumed from a checkpoint begins with a share that took no time now."""
        if not self._known and self.done <= self._given:
            # Until now the phase has waited for a slot and a worker, which its remaining time is no multiple of.
            self._begin_to_measure()
        tries = self.tries.get(unit, 1)
        self.live[unit] = {**body, "tries": tries} if tries > 1 else body
        if unit not in self._known:
            self._known.add(unit)
            self._given += _share(body)

    def look(self, is_working: bool) -> None:
        """Take in whether any of its units is with a worker: others may be more urgent."""
        looked, self._looked = self._looked, time.monotonic()
        self._waited += self._looked - looked if self._waits else 0.0
        self._waits = not is_working

    def _begin_to_measure(self) -> None:
        self._phase_started = self._looked = time.monotonic()
        self._waited, self._waits = 0.0, False

    @property
    def units(self) -> float:
        """Units done, running ones counted by their own share."""
        return min(float(self.total), self.done + sum(map(_share, self.live.values())))

    @property
    def fraction(self) -> float:
        """The same as a share of all units of the phase."""
        return self.units / self.total if self.total else 0.0

    @property
    def rate(self) -> float:
        """Units per second since the first of this driver's began, or since it took up a phase whose units say nothing."""
        elapsed = time.monotonic() - self._phase_started - self._waited
        return max(0.0, self.units - self._given) / elapsed if elapsed > 0.5 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the phase is through, at the present rate."""
        return (self.total - self.units) / self.rate if self.rate > 0 else None

    def describe(self) -> str:
        """The state in one line: `embed 12/30, 1,234 examples/s, 0:42 left`."""
        parts = [f"{self.phase} {self.done}/{self.total}" if self.total > 1 else self.phase]
        if rates := self._values("examples/s"):
            parts.append(f"{sum(rates):,.0f} examples/s")
        if losses := self._values("loss"):
            parts.append(f"loss {sum(losses) / len(losses):.3f}")
        if self._waits and self.done < self.total:
            parts.append("waiting for a slot")
        elif self.eta_seconds is not None and self.units < self.total:
            parts.append(f"{format_seconds(self.eta_seconds)} left")
        return ", ".join(part for part in parts if part)

    def summary(self) -> dict[str, Json]:
        """The content of `status.json`."""
        return {
            "state": self.state,
            "phase": self.phase,
            "units_done": self.done,
            "units_total": self.total,
            "fraction": self.fraction,
            "units_per_second": self.rate,
            "eta_seconds": self.eta_seconds,
            "running": self.live,
            "failures": self.failures,
            "updated": now(),
        }

    def _values(self, name: str) -> list[float]:
        return [float(body["values"][name]) for body in self.live.values() if name in body["values"]]


def _share(body: Mapping[str, Json]) -> float:
    return min(1.0, float(body["done"]) / float(body["total"])) if body["total"] else 0.0


def format_seconds(seconds: float) -> str:
    """A duration for people: `0:07`, `12:30`, `3:05:00`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def format_bytes(count: float) -> str:
    """A size for people: `12.3 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"
