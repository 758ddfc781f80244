"""The Pareto front of file size against predicted loss: measure once, solve any budget.

Budgets are spread evenly on a logarithmic scale from the smallest file to the file of least loss; the sizes of the uniform
allocations join them, so that learned and uniform bits can be read off at equal bytes. Each budget is one integer
program, made easy where the problem allows it: a vertex of the convex hull (where a price per byte makes a choice optimal, found
for all prices at once by sorting the groups' own hulls) is a budget at which the price itself is the proof but for
the header's digits, so a budget moves down to the next vertex unless that is the last point's.

Every point holds what was proved (``gap_nats``; 0: optimal). Points strictly improve: more bytes, less loss.

Limits: predicted loss, as the sensitivities have it. Between two points there may be further ones; ``allocate`` finds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.errors import FormatError, SpecError
from mixbits.jsonfile import read_json, write_json
from mixbits.quant.problem import Problem
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, bits_per_weight, compression_ratio

FORMAT = "mixbits-front"
FORMAT_VERSION = 1
_SAME = 1e-12


@dataclass(frozen=True)
class FrontPoint:
    """One optimal allocation: exact bytes of its file, predicted loss increase (nats per token), how much less a file of
    these bytes could lose at most (0: proved optimal).
    """

    bytes: int
    ratio: float
    bits_per_weight: float
    predicted_loss_increase_nats: float
    gap_nats: float
    allocation: BitAllocation


@dataclass(frozen=True)
class UniformPoint:
    """All units (but the fixed ones) at one spec."""

    spec: QuantSpec
    bytes: int
    predicted_loss_increase_nats: float


@dataclass(frozen=True)
class Front:
    """Points from the smallest to the largest file, strictly improving; the uniform allocations; where it came from."""

    measure: str
    points: tuple[FrontPoint, ...]
    uniform: tuple[UniformPoint, ...]
    full_bytes: int
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def best(self, max_bytes: int) -> FrontPoint:
        """The point of least loss that fits. Raises SpecError, naming the smallest size, if none does."""
        fitting = [p for p in self.points if p.bytes <= max_bytes]
        if not fitting:
            raise SpecError(
                f"a budget of {max_bytes} bytes cannot be met: the smallest file of the front takes "
                f"{self.points[0].bytes} bytes; raise the budget"
            )
        return fitting[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "measure": self.measure,
            "full_bytes": self.full_bytes,
            "points": [
                {
                    "bytes": p.bytes,
                    "ratio": p.ratio,
                    "bits_per_weight": p.bits_per_weight,
                    "predicted_loss_increase_nats": p.predicted_loss_increase_nats,
                    "gap_nats": p.gap_nats,
                    "specs": {name: str(spec) for name, spec in p.allocation.specs.items()},
                }
                for p in self.points
            ],
            "uniform": [
                {
                    "spec": str(u.spec),
                    "bytes": u.bytes,
                    "predicted_loss_increase_nats": u.predicted_loss_increase_nats,
                }
                for u in self.uniform
            ],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any, *, where: str = "front") -> Front:
        """Inverse of :meth:`to_json`. Raises FormatError naming ``where`` and the field."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FormatError(f"{where}: not a mixbits front; expected a JSON object with format {FORMAT!r}")
        if data.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format_version is {data.get('format_version')!r}; this mixbits reads {FORMAT_VERSION}"
            )
        if not isinstance(data.get("points"), list) or not data["points"] or not isinstance(data.get("uniform"), list):
            raise FormatError(f"{where}: 'points' (at least one) or 'uniform' is missing; write the front again")
        points = tuple(_point(p, f"{where}: point {i}") for i, p in enumerate(data["points"]))
        uniform = []
        for i, entry in enumerate(data["uniform"]):
            at = f"{where}: uniform {i}"
            try:
                spec = QuantSpec.parse(entry["spec"])
            except (SpecError, KeyError, TypeError) as error:
                raise FormatError(f"{at}: 'spec' cannot be read ({error})") from None
            uniform.append(
                UniformPoint(spec, int(_number(entry, "bytes", at)), _number(entry, "predicted_loss_increase_nats", at))
            )
        if any(a.bytes >= b.bytes for a, b in pairwise(points)):
            raise FormatError(f"{where}: points are not in order of their bytes; write the front again")
        provenance = data.get("provenance")
        return cls(
            str(data.get("measure")), points, tuple(uniform), int(_number(data, "full_bytes", where)),
            provenance if isinstance(provenance, dict) else {},
        )  # fmt: skip


def _number(data: Any, key: str, where: str) -> float:
    value = data.get(key) if isinstance(data, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise FormatError(f"{where}: {key!r} is {value!r}; expected a number of at least 0")
    return value


def _point(data: Any, where: str) -> FrontPoint:
    keys = ("bytes", "ratio", "bits_per_weight", "predicted_loss_increase_nats", "gap_nats")
    size, ratio, bits, loss, gap = (_number(data, key, where) for key in keys)
    try:
        specs = {str(name): QuantSpec.parse(text) for name, text in data["specs"].items()}
    except (SpecError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{where}: 'specs' cannot be read ({error})") from None
    return FrontPoint(int(size), ratio, bits, loss, gap, BitAllocation(specs))


def read_front(path: str | Path) -> Front:
    """Read a front file. Raises DataError when it cannot be read, FormatError when it is not one."""
    return Front.from_json(read_json(path), where=str(path))


def write_front(path: str | Path, front: Front) -> Path:
    """Write a front file atomically; the same front gives the same bytes."""
    return write_json(path, front.to_json())


def front(
    inventory: ModelInventory,
    sensitivities: Sensitivities,
    *,
    specs: Sequence[QuantSpec] | None = None,
    fixed: Mapping[str, QuantSpec] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    num_points: int = 40,
    on_point: Callable[[int, int], None] | None = None,
) -> Front:
    """Optimal allocations from the smallest file to the one of least predicted loss: about ``num_points`` and one at
    each uniform size; fewer where fewer differ. ``specs``, ``fixed``, ``groups`` as in ``allocate``.

    on_point: called with (budgets done, budgets). Raises SpecError as ``allocate`` does, or for fewer than 2 points.
    """
    if isinstance(num_points, bool) or not isinstance(num_points, int) or num_points < 2:
        raise SpecError(f"num_points is {num_points!r}; expected a whole number of at least 2")
    problem = Problem.of(inventory, sensitivities, specs=specs, fixed=fixed, groups=groups)
    uniforms = sorted(
        (UniformPoint(spec, problem.num_bytes(choice), problem.loss(choice)) for spec, choice in problem.uniforms),
        key=lambda point: point.bytes,
    )
    found: list[tuple[int, float, float, np.ndarray]] = []
    budgets = _budgets(problem, uniforms, num_points)
    for done, (budget, starts) in enumerate(budgets, 1):
        solution = problem.solve(budget, starts=[*starts, *(point[3] for point in found[-1:])])
        size, loss = problem.num_bytes(solution.choice), problem.loss(solution.choice)
        if not found or loss < found[-1][1] * (1 - _SAME):
            found.append((size, loss, solution.gap, solution.choice))
        if on_point is not None:
            on_point(done, len(budgets))
    points = tuple(
        FrontPoint(
            size, compression_ratio(inventory, size), bits_per_weight(inventory, size), loss, gap, problem.allocation(c)
        )
        for size, loss, gap, c in found
    )
    facts = {
        "solver_input_sha256": problem.solver_input_sha256(),
        "num_points_asked": num_points,
        "fixed": {name: str(spec) for name, spec in problem.fixed.items()},
        "groups": [list(names) for names in problem.groups if len(names) > 1],
        "sensitivities": dict(sensitivities.provenance),
    }
    return Front(sensitivities.measure, points, tuple(uniforms), inventory.full_bytes, facts)


def _budgets(problem: Problem, uniforms: Sequence[UniformPoint], num_points: int) -> list[tuple[int, list[np.ndarray]]]:
    """Budgets in ascending order, each with choices known to fit."""
    vertices = [(problem.num_bytes(c), c) for c in _thinned(_hull(problem), problem, num_points)]
    low, high = problem.num_bytes(problem.smallest), problem.num_bytes(problem.cheapest)
    budgets: dict[int, list[np.ndarray]] = {low: [], max(low, high): [problem.cheapest]}
    for point in uniforms:
        if low <= point.bytes <= high:
            budgets.setdefault(point.bytes, [])
    last = low
    for target in np.geomspace(low, max(low, high), num_points)[1:-1]:
        below = [(size, c) for size, c in vertices if last < size <= target]
        if below:
            last, choice = max(below, key=lambda pair: pair[0])
            budgets.setdefault(last, []).append(choice)
        elif int(target) > last:
            last = int(target)
            budgets.setdefault(last, [])
    return sorted(budgets.items(), key=lambda pair: pair[0])


def _hull(problem: Problem) -> list[np.ndarray]:
    """All choices that are optimal at some price a byte, smallest first: the groups' own lower hulls, merged by slope."""
    size = problem.sizes.data + problem.sizes.entries
    choice, steps = [], []
    for k, row in enumerate(problem.useful):
        options = sorted((int(i) for i in np.flatnonzero(np.isfinite(row))), key=lambda i: (size[k, i], row[i]))
        hull: list[int] = []
        for i in options:
            if hull and row[i] >= row[hull[-1]]:
                continue
            while len(hull) >= 2 and _slope(row, size[k], hull[-2], hull[-1]) >= _slope(row, size[k], hull[-2], i):
                hull.pop()
            hull.append(i)
        choice.append(hull[0])
        steps += [(_slope(row, size[k], a, b), k, b) for a, b in pairwise(hull)]
    found = [np.array(choice)]
    for _, k, i in sorted(steps):
        found.append(found[-1].copy())
        found[-1][k] = i
    return found


def _slope(value: np.ndarray, size: np.ndarray, a: int, b: int) -> float:
    """Change of loss per byte; falling steeply is negative."""
    more = float(size[b] - size[a])
    return float(value[b] - value[a]) / more if more > 0 else -math.inf


def _thinned(choices: Sequence[np.ndarray], problem: Problem, num_points: int) -> list[np.ndarray]:
    """Of each logarithmic step's vertices the largest two or so: exact bytes take time."""
    rows = np.arange(len(problem.groups))
    size = problem.sizes.data + problem.sizes.entries
    rough = np.array([size[rows, c].sum() for c in choices]) + problem.sizes.other_bytes
    edges = np.geomspace(rough[0], max(rough[0], rough[-1]), 3 * num_points)
    wanted = np.unique(np.searchsorted(rough, edges, side="right") - 1)
    return [choices[i] for i in wanted if i >= 0]
