"""Time of one training step: straight-through and ADMM against full precision, same model, same batch, no teacher.

Target: at most 1.3 times a full-precision step. The architecture is that of recipes/ptb-small.yaml (3 layers, d 256, feed-forward
1024, 10,000 words, batch 16 x 128, bfloat16 autocast), random weights and tokens. A step is the trainer's: before_forward, loss,
backward, after_backward, gradient clipping, AdamW, after_step. The systems take turns in one process (A B C A B C ...), so that a
machine that is busy for a while slows all of them; ratios are taken within a turn. The ratio that counts is of processor time, which with
one thread is the time of the step on a free core; wall time is given beside it. ADMM's projections, every 1/40 of a training, are
spread over the steps: their time times 40 over the number of steps of one epoch of PTB is added to its step.

Usage: OMP_NUM_THREADS=1 python benchmarks/bench_steps.py [--steps 15] [--output results/bench_steps.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from mixbits.lm.loss import training_loss
from mixbits.quant.admm import Admm
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units
from mixbits.runs import versions, write_json
from mixbits.spec import BitAllocation, QuantSpec

VOCABULARY, BATCH, CONTEXT, LAYERS, WIDTH, FEED_FORWARD, HEADS = 10_000, 16, 128, 3, 256, 1024, 4
STEPS_PER_EPOCH = 930_000 // (BATCH * CONTEXT)
WIDTHS = (1.58, 2, 4)  # taken in turn by the units, so that all kinds of grid are timed
TARGET = 1.3


def build_model() -> Any:
    """The recipe's architecture with random weights."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=LAYERS, ffn_dim=FEED_FORWARD,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, do_layer_norm_before=False, activation_function="gelu",
        dropout=0.2, attention_dropout=0.0, pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config).train()


class Stepper:
    """One model with its optimizer and method."""

    def __init__(self, kind: str) -> None:
        self.model, self.method = build_model(), None
        inventory = find_units(self.model)
        specs = {u.name: QuantSpec(WIDTHS[i % len(WIDTHS)]) for i, u in enumerate(inventory.units)}
        if kind == "straight-through":
            self.method = StraightThrough(self.model, inventory, BitAllocation(specs))
        elif kind == "admm":
            self.method = Admm(self.model, inventory, BitAllocation(specs))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """One training step; returns its processor and wall seconds."""
        start, wall = time.process_time(), time.perf_counter()
        if self.method is not None:
            self.method.before_forward(self.model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_loss(self.model, ids)
        loss.backward()
        if self.method is not None:
            self.method.after_backward(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad()
        if self.method is not None:
            self.method.after_step(self.model, 1, 10**9)
        return time.process_time() - start, time.perf_counter() - wall

    def update(self) -> tuple[float, float]:
        """One projection and dual update; returns its processor and wall seconds."""
        assert self.method is not None
        start, wall = time.process_time(), time.perf_counter()
        self.method.after_step(self.model, 1, self.method.num_updates)
        return time.process_time() - start, time.perf_counter() - wall


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def figures(
    times: dict[str, list[tuple[float, float]]], updates: list[tuple[float, float]], num_updates: int, clock: int
) -> dict[str, Any]:
    """Ratios and seconds by one of the two clocks."""
    seconds = {name: [pair[clock] for pair in pairs] for name, pairs in times.items()}
    update = statistics.median(pair[clock] for pair in updates)
    share = update * num_updates / STEPS_PER_EPOCH
    ratios = {
        "straight-through": [t / f for t, f in zip(seconds["straight-through"], seconds["full"], strict=True)],
        "admm": [(t + share) / f for t, f in zip(seconds["admm"], seconds["full"], strict=True)],
    }
    return {
        "ratios": {name: spread(values) for name, values in ratios.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "admm_update_seconds": update,
        "admm_update_seconds_per_step": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="turns to time, after two of warm-up")
    parser.add_argument("--output", default=None, help="JSON file to write")
    options = parser.parse_args()
    names = ("full", "straight-through", "admm")
    steppers = {name: Stepper(name) for name in names}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(options.steps + 2):
        for name in names:
            seconds = steppers[name].step(ids)
            if turn >= 2:
                times[name].append(seconds)
    updates = [steppers["admm"].update() for _ in range(3)]
    result = {
        "benchmark": "training step against a full-precision step",
        "target_ratio_at_most": TARGET,
        "processor_time": figures(times, updates, steppers["admm"].method.num_updates, 0),
        "wall_time": figures(times, updates, steppers["admm"].method.num_updates, 1),
        "turns": options.steps,
        "seed": 0,
        "setting": {
            "vocabulary": VOCABULARY, "batch": BATCH, "context": CONTEXT, "layers": LAYERS, "width": WIDTH,
            "feed_forward": FEED_FORWARD, "bit_widths_in_turn": WIDTHS, "precision": "bfloat16 autocast",
            "threads": torch.get_num_threads(), "admm_updates_per_steps": [steppers["admm"].method.num_updates, STEPS_PER_EPOCH],
        },
        "versions": versions(),
    }  # fmt: skip
    for kind in ("processor_time", "wall_time"):
        for name, values in result[kind]["ratios"].items():
            low, middle, high = values["quartile_1"], values["median"], values["quartile_3"]
            print(f"{kind} {name}: {middle:.3f} x a full-precision step ({low:.3f} to {high:.3f})")
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
