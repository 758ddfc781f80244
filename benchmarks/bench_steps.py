"""Time of one training step of every method against full precision, same model, same batch, no teacher.

Targets: at most 1.3 times a full-precision step, extra-gradient (two forward and backward passes) at most 2.4. The architecture is that
of recipes/ptb-small.yaml (3 layers, d 256, feed-forward 1024, 10,000 words, batch 16 x 128), random weights and tokens; --precision
chooses bfloat16 autocast (the recipe's) or float32. A step is the trainer's: before_forward, loss, backward, after_backward, second
gradient if asked for, gradient clipping, AdamW, after_step. The systems take turns in one process (A B C A B C ...), so that a machine that is busy for
a while slows all of them; ratios are taken within a turn. The ratio that counts is of processor time, which with one thread is the time of
the step on a free core; wall time is given beside it. What happens only now and then (a Lagrangian solver's projections, the
progressive method's new scales) is timed by itself, and its share of one epoch of PTB is added to the step.

Usage: OMP_NUM_THREADS=1 python benchmarks/bench_steps.py [--steps 15] [--precision float32] [--output results/bench_steps.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

from mixbits.lm.loss import training_loss
from mixbits.quant.admm import Admm
from mixbits.quant.progressive import DEFAULT_STAGES, Progressive
from mixbits.quant.proximal import Proximal
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units
from mixbits.runs import versions, write_json
from mixbits.spec import BitAllocation, QuantSpec

VOCABULARY, BATCH, CONTEXT, LAYERS, WIDTH, FEED_FORWARD, HEADS = 10_000, 16, 128, 3, 256, 1024, 4
STEPS_PER_EPOCH = 930_000 // (BATCH * CONTEXT)
WIDTHS = (1.58, 2, 4)  # taken in turn by the units, so that all kinds of grid are timed
TARGET, TWO_GRADIENT_TARGET = 1.3, 2.4
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "straight-through": (StraightThrough, {}),
    "straight-through-learned": (StraightThrough, {"scales": "learned"}),
    "admm-projected": (Admm, {}),
    "admm-adamw": (Admm, {"solver": "adamw"}),
    "admm-extragradient": (Admm, {"solver": "extragradient"}),
    "admm-extragradient-adamw": (Admm, {"solver": "extragradient-adamw"}),
    "proximal": (Proximal, {}),
    "progressive": (Progressive, {}),
}
TWO_GRADIENTS = ("admm-extragradient", "admm-extragradient-adamw")


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

    def __init__(self, kind: str, precision: str) -> None:
        self.model, self.method = build_model(), None
        self.autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
        inventory = find_units(self.model)
        specs = {u.name: QuantSpec(WIDTHS[i % len(WIDTHS)]) for i, u in enumerate(inventory.units)}
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        if kind in METHODS:
            build, options = METHODS[kind]
            self.method = build(self.model, inventory, BitAllocation(specs), **options)
            if hasattr(self.method, "extra_parameters"):
                groups += self.method.extra_parameters(self.model)
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, weight_decay=0.01, fused=True)

    def loss(self, ids: torch.Tensor) -> None:
        """Forward and backward."""
        with self.autocast:
            loss = training_loss(self.model, ids)
        loss.backward()

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """One training step; returns its processor and wall seconds."""
        start, wall = time.process_time(), time.perf_counter()
        if self.method is not None:
            self.method.before_forward(self.model)
        self.loss(ids)
        if self.method is not None:
            self.method.after_backward(self.model)
            if hasattr(self.method, "second_gradient") and self.method.second_gradient(self.model):
                self.loss(ids)
                self.method.after_backward(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad()
        if self.method is not None:  # step 2 of an epoch: an update for "projected" only
            self.method.after_step(self.model, 2, STEPS_PER_EPOCH)
        if isinstance(self.method, Proximal):
            self.method.hardness = 0.5  # the ramp; before and after annealing there is less to do
        return time.process_time() - start, time.perf_counter() - wall

    def occasional(self) -> tuple[int, tuple[float, float]]:
        """How often in an epoch something more is done, and its processor and wall seconds (median of three)."""
        method = self.method
        if isinstance(method, Admm) and method.num_updates is not None:
            count, work = method.num_updates, lambda: method.after_step(self.model, 1, method.num_updates)
        elif isinstance(method, Progressive):
            count, work = len(DEFAULT_STAGES), lambda: method._enter(self.model, 1)  # type: ignore[assignment, return-value]
        else:
            return 0, (0.0, 0.0)
        times = []
        for _ in range(3):
            start, wall = time.process_time(), time.perf_counter()
            work()
            times.append((time.process_time() - start, time.perf_counter() - wall))
        return count, (statistics.median(t[0] for t in times), statistics.median(t[1] for t in times))


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def figures(
    times: dict[str, list[tuple[float, float]]], occasional: dict[str, tuple[int, tuple[float, float]]], clock: int
) -> dict[str, Any]:
    """Ratios and seconds by one of the two clocks."""
    seconds = {name: [pair[clock] for pair in pairs] for name, pairs in times.items()}
    shares = {name: count * work[clock] / STEPS_PER_EPOCH for name, (count, work) in occasional.items()}
    ratios = {
        name: [(t + shares[name]) / f for t, f in zip(seconds[name], seconds["full"], strict=True)] for name in METHODS
    }
    return {
        "ratios": {name: spread(values) for name, values in ratios.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "occasional_seconds_per_step": {name: share for name, share in shares.items() if share},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="turns to time, after two of warm-up")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", default=None, help="JSON file to write")
    options = parser.parse_args()
    names = ("full", *METHODS)
    steppers = {name: Stepper(name, options.precision) for name in names}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(options.steps + 2):
        for name in names:
            seconds = steppers[name].step(ids)
            if turn >= 2:
                times[name].append(seconds)
    occasional = {name: steppers[name].occasional() for name in METHODS}
    result = {
        "benchmark": "training step against a full-precision step",
        "target_ratio_at_most": {name: TWO_GRADIENT_TARGET if name in TWO_GRADIENTS else TARGET for name in METHODS},
        "processor_time": figures(times, occasional, 0),
        "wall_time": figures(times, occasional, 1),
        "turns": options.steps,
        "seed": 0,
        "setting": {
            "vocabulary": VOCABULARY, "batch": BATCH, "context": CONTEXT, "layers": LAYERS, "width": WIDTH,
            "feed_forward": FEED_FORWARD, "bit_widths_in_turn": WIDTHS, "precision": options.precision,
            "threads": torch.get_num_threads(), "steps_per_epoch": STEPS_PER_EPOCH,
            "occasional_per_epoch": {name: count for name, (count, _) in occasional.items() if count},
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
