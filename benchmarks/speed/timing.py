"""Interleaved timing, ratios within a round, and whether the machine was quiet.

All systems take turns (A B C A B C ...), so that a machine that slows down slows all of them; a ratio is the median over rounds of the
ratio within the round. Between turns there is a short pause, so that threads of the last system that still spin are asleep, and every
turn begins with untimed work, so that those of this one are awake.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Seconds = dict[str, list[float | None]]
PAUSE_SECONDS = 0.01
QUIET_LOAD, QUIET_OTHER_CORES = 0.5, 0.1


def interleave(
    systems: Mapping[str, Callable[[], float]], *, rounds: int, budget_seconds: float, say: Callable[[str], None]
) -> Seconds:
    """Seconds of each system in each round after one of warm-up; each callable returns the seconds that count.

    A system that used up its budget is left out of the rounds that follow (None), after three at least; one whose warm-up alone took
    longer is not called again and that warm-up is its only round.
    """
    found: Seconds = {name: [] for name in systems}
    spent = dict.fromkeys(systems, 0.0)
    for turn in range(rounds + 1):
        for name, work in systems.items():
            done = sum(value is not None for value in found[name])
            if spent[name] > budget_seconds and done >= (1 if found[name] and found[name][0] == spent[name] else 3):
                found[name].append(None)
                continue
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            seconds = work()
            wall = time.perf_counter() - started
            if turn:
                spent[name] += wall
                found[name].append(seconds)
            elif wall > budget_seconds:
                say(f"  {name} took {wall:.0f} s once: not called again")
                spent[name] = seconds
                found[name].append(seconds)
        if turn in (1, rounds):
            say(f"  round {turn} of {rounds}")
    return {name: values[:rounds] for name, values in found.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, extremes and number of values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return {
        "median": middle, "quartile_1": low, "quartile_3": high, "least": min(values), "largest": max(values),
        "rounds": len(values),
    }  # fmt: skip


def times_faster(seconds: Seconds, ours: str, theirs: str) -> dict[str, float]:
    """How many times as fast ``ours`` is, by rounds in which both ran."""
    pairs = [(a, b) for a, b in zip(seconds[ours], seconds[theirs], strict=False) if a is not None and b is not None]
    return spread([b / a for a, b in pairs])


def best_of(seconds: Seconds, names: list[str]) -> str:
    """The system with the least median time."""
    return min(names, key=lambda name: statistics.median(v for v in seconds[name] if v is not None))


def _busy_seconds() -> float | None:
    """Seconds all processors of the machine have worked since it started; None where /proc/stat is not there."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except (OSError, IndexError):
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields)
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


class Quiet:
    """Watches how much other processes work from its making to :meth:`result`; children have to be waited for before."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.busy, self.own, self.wall = _busy_seconds(), _own_seconds(), time.perf_counter()

    def result(self) -> dict[str, Any]:
        """``quiet``: load average before the run below 0.5, and others used less than 0.1 cores during it."""
        busy, others = _busy_seconds(), None
        if busy is not None and self.busy is not None:
            others = max(0.0, busy - self.busy - (_own_seconds() - self.own)) / (time.perf_counter() - self.wall)
        quiet = self.load < QUIET_LOAD and (others is None or others < QUIET_OTHER_CORES)
        return {"quiet": quiet, "load_average_before": self.load, "cores_used_by_others": others}
