"""Time of allocating bits to 1,000 units with 12 specs each under a byte budget (the limit is 2 s), and to models of usual size;
of the whole Pareto front (40 sizes and every uniform one), unit by unit and with one spec a layer.

Sensitivities are random: log-normal traces, errors falling by 4 a bit with 10 % scatter, one scale a row or a tensor. For every
size the answer is checked to fit, and the proved gap to the optimum is reported.

    python benchmarks/bench_allocate.py

Writes results/bench_allocate.json.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

from mixbits.quant.allocate import allocate, budget_bytes
from mixbits.quant.front import front
from mixbits.quant.groups import UnitGranularity, group_units
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.runs import versions, write_json
from mixbits.spec import ModelInventory, Unit, parse_specs, predicted_bytes

SPECS = parse_specs([f"{b}-{g}" for g in ("row", "tensor") for b in ("1", "1.58", "2", "3", "4", "8")])
RATIOS = (28, 20, 16, 10, 6)


def random_problem(num_units: int, seed: int) -> Sensitivities:
    rng = random.Random(seed)
    names = [f"model.layers.{i // 6}.proj{i % 6}" for i in range(num_units)]
    units = tuple(Unit(n, f"{n}.weight", 128 * rng.randint(1, 8), 128 * rng.randint(1, 8), "linear") for n in names)
    inventory = ModelInventory(units, tuple((f"model.layers.{i}.norm.weight", (128,)) for i in range(num_units // 6)))
    measured = {}
    for unit in units:
        trace = 1e-4 * math.exp(rng.gauss(0, 2))
        loss = {
            s: trace * 4.0**-s.bit_width * math.exp(rng.gauss(0, 0.1)) * (1.1 if s.granularity == "tensor" else 1)
            for s in SPECS
        }
        measured[unit.name] = UnitSensitivity(loss, dict.fromkeys(loss, 0.0), dict.fromkeys(loss, 1.0))
    return Sensitivities("random", inventory, measured, 0.0)


def measure(num_units: int, seeds: int) -> dict[str, Any]:
    wall, cpu, gaps = [], [], []
    for seed in range(seeds):
        problem = random_problem(num_units, seed)
        for ratio in RATIOS:
            budget = budget_bytes(problem.inventory, ratio=ratio)
            start, started = time.process_time(), time.perf_counter()
            found = allocate(problem.inventory, problem, max_bytes=budget)
            cpu.append(time.process_time() - start)
            wall.append(time.perf_counter() - started)
            assert predicted_bytes(problem.inventory, found) <= budget
            gaps.append(found.provenance["gap_nats"] / found.provenance["predicted_loss_increase_nats"])
    return {
        "units": num_units,
        "specs": len(SPECS),
        "solved": len(cpu),
        "cpu_seconds_median": statistics.median(cpu),
        "cpu_seconds_max": max(cpu),
        "wall_seconds_median": statistics.median(wall),
        "wall_seconds_max": max(wall),
        "proved_optimal": sum(g == 0 for g in gaps),
        "relative_gap_max": max(gaps),
    }


def measure_front(num_units: int, granularity: UnitGranularity, seeds: int) -> dict[str, Any]:
    cpu, wall, points, proved, gaps = [], [], 0, 0, [0.0]
    for seed in range(seeds):
        problem = random_problem(num_units, seed)
        groups = group_units(problem.inventory, granularity)
        start, started = time.process_time(), time.perf_counter()
        found = front(problem.inventory, problem, groups=groups)
        cpu.append(time.process_time() - start)
        wall.append(time.perf_counter() - started)
        assert all(p.bytes == predicted_bytes(problem.inventory, p.allocation) for p in found.points)
        points += len(found.points)
        proved += sum(p.gap_nats == 0 for p in found.points)
        gaps += [p.gap_nats / p.predicted_loss_increase_nats for p in found.points if p.gap_nats]
    return {
        "units": num_units,
        "granularity": granularity,
        "fronts": seeds,
        "points": points,
        "proved_optimal": proved,
        "relative_gap_max": max(gaps),
        "cpu_seconds_median": statistics.median(cpu),
        "cpu_seconds_max": max(cpu),
        "wall_seconds_median": statistics.median(wall),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("results/bench_allocate.json"))
    args = parser.parse_args()
    measure(25, 1)  # imports and warm-up
    rows = []
    for num_units in (25, 100, 300, 1000):
        row = measure(num_units, args.seeds)
        print(
            f"{num_units} units x {row['specs']} specs: median {row['cpu_seconds_median']:.2f} s CPU, at most "
            f"{row['cpu_seconds_max']:.2f} s; {row['proved_optimal']} of {row['solved']} proved optimal, the others within "
            f"{row['relative_gap_max']:.1g} of it"
        )
        rows.append(row)
    fronts = []
    kinds: tuple[tuple[int, UnitGranularity], ...] = ((25, "matrix"), (100, "matrix"), (100, "layer"), (300, "matrix"))
    for num_units, granularity in kinds:
        row = measure_front(num_units, granularity, args.seeds)
        print(
            f"front of {num_units} units by {granularity}: median {row['cpu_seconds_median']:.1f} s CPU; {row['proved_optimal']} of "
            f"{row['points']} points proved optimal"
        )
        fronts.append(row)
    note = "shared machine: CPU seconds are the fairer figure"
    write_json(args.output, {"note": note, "ratios": RATIOS, "rows": rows, "fronts": fronts, "versions": versions()})


if __name__ == "__main__":
    main()
