"""Sensitivity measures on a small trained model: what each costs, how well it ranks, and the allocation it leads to.

A 3-layer Llama is trained on Penn Treebank's first sentences (``MIXBITS_DATA`` names the data folder; without
it on made-up text), then uniform prototypes are trained quantized from it. Every measure sees the same blocks of
training text; what it is compared with is measured on held-out text: the loss with one unit quantized before training, and with one
unit of another prototype after it. Cost: counted passes, and CPU seconds over those of a forward-backward pass on the same
tokens, on one thread.

    MIXBITS_DATA=/data python benchmarks/bench_measures.py

Writes results/bench_measures.json in under five minutes of one core. Timed costs include projecting all units on
all grids (given by itself too), which weighs much here because model and text are tiny. One seed, one small model: ranks, not laws.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import DataError
from mixbits.lm.corpus import TokenStream, encode, read_sentences, token_batches
from mixbits.lm.loss import mean_loss
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer
from mixbits.lm.train import TrainSettings, train_model
from mixbits.pipeline.quantize import train_quantized
from mixbits.pipeline.settings import QuantizeSettings
from mixbits.quant.allocate import allocate, budget_bytes
from mixbits.quant.grid import fake_quantize
from mixbits.quant.measures import (
    allocation_loss,
    measure_fisher,
    measure_hessian,
    measure_kl,
    measure_loss,
    measure_prototypes,
)
from mixbits.quant.measures.agreement import rank_agreement
from mixbits.quant.measures.interaction import iterate_allocation
from mixbits.quant.sensitivity import Sensitivities
from mixbits.quant.units import find_units, unit_matrices
from mixbits.runs import versions, write_json
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, parse_specs

SIZE = ModelSize(preset="llama", num_layers=3, hidden_size=64, feed_forward_size=128, num_heads=4, context=64)
VOCABULARY, SENTENCES, HELD_OUT = 1000, 4000, 600
SHARED: dict[str, Any] = {"batch_size": 16, "context": 64, "precision": "float32"}
TRAIN = TrainSettings(epochs=5, learning_rate=3e-3, **SHARED)
PROTOTYPE = TrainSettings(epochs=0.5, learning_rate=1e-3, teacher_weight=0.5, **SHARED)
SPECS = parse_specs(["1", "1.58", "2", "3", "4", "8"])
TRAINED_SPECS = parse_specs(["1", "1.58", "2", "4"])
PROBES, BLOCKS, HELD_OUT_BLOCKS, MICRO_BATCH = 30, 24, 64, 8
ROUNDS = 3


def sentences() -> tuple[list[str], str]:
    """Training and held-out sentences together, and where they are from."""
    number = SENTENCES + HELD_OUT
    if "MIXBITS_DATA" in os.environ:
        path = Path(os.environ["MIXBITS_DATA"]) / "ptb" / "ptb.train.txt"
        return [s for s, _ in zip(read_sentences(path), range(number), strict=False)], "Penn Treebank"
    rng = random.Random(0)
    words = [f"w{i}" for i in range(600)]
    follow = {w: rng.choices(words, [1 / (i + 1) for i in range(600)], k=12) for w in words}
    made = []
    for _ in range(number):
        line = [rng.choice(words[:40])]
        while len(line) < 20 and rng.random() > 0.05:
            line.append(follow[line[-1]][min(int(rng.expovariate(0.5)), 11)])
        made.append(" ".join(line))
    return made, "made-up text"


def train(folder: Path) -> tuple[Any, TokenStream, TokenStream, str]:
    text, source = sentences()
    tokenizer = word_tokenizer(text[:SENTENCES], max_words=VOCABULARY, max_length=SIZE.context)
    stream, held_out = (encode(tokenizer, part) for part in (text[:SENTENCES], text[SENTENCES:]))
    model = build_model(SIZE, tokenizer, seed=0)
    train_model(model, stream, held_out, TRAIN, folder / "full", title="full")
    return model.eval(), stream, held_out, source


def train_prototypes(
    model: Any, streams: tuple[TokenStream, TokenStream], folder: Path
) -> tuple[dict[QuantSpec, dict[str, torch.Tensor]], Any]:
    """Units of a model trained uniformly at each spec, and the model of the highest precision."""
    result, student, teacher = {}, model, copy.deepcopy(model)
    settings = QuantizeSettings(train=PROTOTYPE, refine_epochs=0)
    for spec in TRAINED_SPECS:
        student = copy.deepcopy(model)
        inventory = find_units(student)
        allocation = BitAllocation({u.name: spec for u in inventory.units})
        train_quantized(student, *streams, allocation, settings, folder / str(spec), teacher=teacher, title=str(spec))
        result[spec] = {n: m.clone() for n, m in unit_matrices(student, inventory).items()}
    return result, student.eval()


def forward_backward_seconds(model: Any, batches: list[torch.Tensor]) -> float:
    times = []
    for _ in range(6):
        start = time.process_time()
        for batch in batches:
            mean_loss(model, batch).backward()
        times.append(time.process_time() - start)
        model.zero_grad()
    return statistics.median(times[1:])


def projection_seconds(model: Any, inventory: ModelInventory) -> float:
    """Fake-quantizing every unit at every spec once, which each measure does; small beside passes over a larger model and more text."""
    start = time.process_time()
    for matrix in unit_matrices(model, inventory).values():
        for spec in SPECS:
            fake_quantize(matrix, spec)
    return time.process_time() - start


def check(model: Any, inventory: ModelInventory, batches: list[torch.Tensor], found: Sensitivities) -> None:
    """The measured loss of one unit is that of a model changed by hand."""
    name, spec = inventory.units[0].name, SPECS[0]
    other = copy.deepcopy(model)
    matrix = unit_matrices(other, inventory)[name]
    matrix.copy_(fake_quantize(matrix, spec))
    expected = allocation_loss(other, inventory, batches, None)[0] - allocation_loss(model, inventory, batches, None)[0]
    if not math.isclose(found.units[name].loss_increase[spec], expected, rel_tol=1e-3):
        raise DataError(
            f"measured loss is {found.units[name].loss_increase[spec]}, by hand {expected}: do not trust this run"
        )


def measure_all(
    model: Any, inventory: ModelInventory, batches: list[torch.Tensor]
) -> dict[str, tuple[Sensitivities, float]]:
    """Name -> what was found, CPU seconds."""
    jobs = {
        "hessian": lambda: measure_hessian(model, inventory, batches, SPECS, seed=0, num_probes=PROBES),
        "fisher (drawn labels)": lambda: measure_fisher(model, inventory, batches, SPECS, seed=0, labels="model"),
        "fisher (data labels)": lambda: measure_fisher(model, inventory, batches, SPECS, seed=0, labels="data"),
        "kl": lambda: measure_kl(model, inventory, batches, SPECS, seed=0),
        "loss": lambda: measure_loss(model, inventory, batches, SPECS, seed=0),
    }
    found = {}
    for name, job in jobs.items():
        start = time.process_time()
        result = job()
        found[name] = (result, time.process_time() - start)
    return found


def losses(found: Sensitivities, specs: tuple[QuantSpec, ...]) -> dict[str, dict[QuantSpec, float]]:
    return {n: {s: u.loss_increase[s] for s in specs} for n, u in found.units.items()}


def run(ratios: list[float]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model, train_stream, held_stream, source = train(Path(folder))
        prototypes, base = train_prototypes(model, (train_stream, held_stream), Path(folder))
    inventory = find_units(model)
    batches, held_out = (
        token_batches(stream, context=SIZE.context, num_blocks=number, micro_batch=MICRO_BATCH, seed=0)
        for stream, number in ((train_stream, BLOCKS), (held_stream, HELD_OUT_BLOCKS))
    )
    full, full_error = allocation_loss(model, inventory, held_out, None)
    before = measure_loss(model, inventory, held_out, SPECS, seed=0)
    check(model, inventory, held_out, before)
    after = measure_prototypes(base, inventory, held_out, TRAINED_SPECS, seed=0, prototypes=prototypes)
    unit_seconds = forward_backward_seconds(model, batches)
    budgets = {ratio: budget_bytes(inventory, ratio=ratio) for ratio in ratios}

    def rise(allocation: BitAllocation) -> float:
        return allocation_loss(model, inventory, held_out, allocation)[0] - full

    rows = []
    for name, (found, seconds) in measure_all(model, inventory, batches).items():
        error, unit, spec = found.largest_relative_stderr
        rows.append({
            "measure": name,
            "cost_forward_backwards_counted": found.cost_forward_backwards,
            "cost_forward_backwards_timed": seconds / unit_seconds,
            "cost_per_unit_counted": found.cost_forward_backwards / len(inventory.units),
            "median_relative_stderr": statistics.median(
                u.stderr[s] / abs(u.loss_increase[s]) for u in found.units.values() for s in SPECS
            ),
            "largest_relative_stderr": error, "largest_at": f"{unit} {spec}",
            "rank_correlation_before_training": rank_agreement(found, before).to_json(),
            "rank_correlation_after_training": rank_agreement(losses(found, TRAINED_SPECS), after).to_json(),
            "allocations": {
                f"{ratio:g}x": rise(allocate(inventory, found, max_bytes=size)) for ratio, size in budgets.items()
            },
        })  # fmt: skip
        print(f"{name}: {rows[-1]}", flush=True)
    ratio = max(budgets)
    rounds = {f"{ratio:g}x": iterated(model, inventory, batches, budgets[ratio], rise)}
    return {
        "text": source, "units": len(inventory.units), "parameters": inventory.num_parameters,
        "full_held_out_nats": full, "full_held_out_stderr": full_error,
        "forward_backward_seconds": unit_seconds,
        "projection_forward_backwards_timed": projection_seconds(model, inventory) / unit_seconds, "rows": rows,
        "interaction_aware_loss": rounds,
        "before_against_after": rank_agreement(losses(before, TRAINED_SPECS), after).to_json(),
    }  # fmt: skip


def iterated(
    model: Any, inventory: ModelInventory, batches: list[torch.Tensor], size: int, rise: Any
) -> dict[str, Any]:
    """Measured loss re-measured around the allocation; picked by the loss on the measured blocks, reported on held-out text."""
    found = iterate_allocation(
        lambda around: measure_loss(model, inventory, batches, SPECS, seed=0, around=around),
        lambda sensitivities: allocate(inventory, sensitivities, max_bytes=size),
        ROUNDS,
        measured_loss=lambda allocation: allocation_loss(model, inventory, batches, allocation)[0],
    )
    return {
        "ended": found.ended,
        "rounds": [{"predicted": r.predicted_loss_increase, "held_out_rise": rise(r.allocation)} for r in found.rounds],
        "picked_held_out_rise": rise(found.best.allocation),
        "cost_forward_backwards": found.cost_forward_backwards,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/bench_measures.json"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[10.0, 13.0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, started = time.perf_counter(), time.process_time()
    found = run(args.ratios)
    settings = {
        "model": SIZE.model_dump(), "train": TRAIN.model_dump(), "prototypes": PROTOTYPE.model_dump(),
        "probes": PROBES, "blocks": BLOCKS, "held_out_blocks": HELD_OUT_BLOCKS, "specs": [str(s) for s in SPECS],
    }  # fmt: skip
    note = "CPU seconds of one thread on a shared machine: only the ratios of one run mean anything"
    seconds = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.perf_counter() - start}
    write_json(args.output, {"note": note, "settings": settings, **found, **seconds, "versions": versions()})


if __name__ == "__main__":
    main()
