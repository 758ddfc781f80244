"""Time and memory of a search step against a plain training step: same model, same batch, no teacher, four candidates.

Target: a search step costs at most 2 times a plain one, in time and in memory, when weights are mixed; mixing whole sublayers'
outputs is shown for comparison and has no target. A search step is a training step of the super-net plus its share (one of every
``arch_every``, the default 4) of an architecture step on a held-out batch of the same size. The architecture is that of
`bench_steps.py` at a batch of 16 x 128 tokens in float32, random weights and tokens.

Time: the systems take turns in one process (A B A B ...), processor time with one thread, ratios within a turn. Checked first: mixing
weights and mixing outputs of single matrices give the same loss. Memory: peak resident bytes of a process of its own that takes one
architecture period, less its resident bytes before the model was built (libraries alone), so that activations, gradients and
optimizer all count.

Usage: OMP_NUM_THREADS=1 python benchmarks/bench_search.py [--periods 3] [--output results/bench_search.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mixbits.lm.loss import evaluation_mode, training_loss
from mixbits.quant.groups import group_units
from mixbits.quant.supernet import SuperNet
from mixbits.quant.units import find_units
from mixbits.runs import versions, write_json
from mixbits.spec import BitAllocation, QuantSpec, parse_specs, predicted_bytes

VOCABULARY, BATCH, CONTEXT, LAYERS, WIDTH, FEED_FORWARD, HEADS = 10_000, 16, 128, 3, 256, 1024, 4
CANDIDATES = ("1", "1.58", "2", "4")
ARCH_EVERY = 4
TARGET = 2.0
NAMES = ("full", "weights", "outputs")


def build_model() -> Any:
    """The benchmark's architecture with random weights."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=LAYERS, ffn_dim=FEED_FORWARD,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, do_layer_norm_before=False, activation_function="gelu",
        dropout=0.2, attention_dropout=0.0, pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config).train()


def tokens(seed: int) -> torch.Tensor:
    """A batch of random blocks."""
    return torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))


def search_method(model: Any, mode: str, granularity: str) -> SuperNet:
    """A super-net with held-out batches of the training batch's size."""
    held_out = tokens(1)

    def held_out_loss(model: Any, index: int) -> torch.Tensor:
        with evaluation_mode(model):
            return training_loss(model, held_out)

    inventory = find_units(model)
    budget = predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec(2)))
    return SuperNet(
        model, inventory, parse_specs(CANDIDATES), max_bytes=budget, held_out_loss=held_out_loss, mode=mode,  # type: ignore[arg-type]
        groups=group_units(inventory, granularity), arch_every=ARCH_EVERY,  # type: ignore[arg-type]
    )  # fmt: skip


class Stepper:
    """One model with its optimizer and method."""

    def __init__(self, kind: str) -> None:
        self.model = build_model()
        granularity = "sublayer" if kind == "outputs" else "matrix"
        self.method = None if kind == "full" else search_method(self.model, kind, granularity)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
        self.number = 0

    def period(self, ids: torch.Tensor) -> float:
        """``ARCH_EVERY`` steps, the last with an architecture step; returns processor seconds a step."""
        start = time.process_time()
        for _ in range(ARCH_EVERY):
            self.number += 1
            if self.method is not None:
                self.method.before_forward(self.model)
            training_loss(self.model, ids).backward()
            if self.method is not None:
                self.method.after_backward(self.model)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.model.zero_grad()
            if self.method is not None:
                self.method.after_step(self.model, self.number, 10**6)
        return (time.process_time() - start) / ARCH_EVERY


def check() -> float:
    """Relative difference of the loss between the two modes when each sublayer is one matrix; at most 1e-5."""
    losses = []
    for mode in ("weights", "outputs"):
        model = build_model().eval()
        method = search_method(model, mode, "matrix")
        method.weights.data.copy_(torch.randn(method.weights.shape, generator=torch.Generator().manual_seed(0)))
        method.before_forward(model)
        with torch.no_grad():
            losses.append(float(training_loss(model, tokens(0))))
        method._put_back()
    difference = abs(losses[0] - losses[1]) / losses[0]
    if not difference < 1e-5:
        raise SystemExit(f"the modes disagree: losses {losses}")
    return difference


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_bytes(kind: str) -> int:
    """Peak resident bytes of one period in a process of its own, above its libraries'."""
    command = [sys.executable, __file__, "--memory-of", kind]
    return int(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["bytes"])


def _memory_of(kind: str) -> None:
    training_loss(build_model(), tokens(0)[:1, :4]).backward()  # whatever a first call loads
    before = _resident_bytes()
    Stepper(kind).period(tokens(0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"bytes": peak - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--periods", type=int, default=3, help="turns to time, after one of warm-up")
    parser.add_argument("--output", default=None, help="JSON file to write")
    parser.add_argument("--memory-of", default=None, choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        _memory_of(options.memory_of)
        return
    difference = check()
    memory = {name: peak_bytes(name) for name in NAMES}
    steppers = {name: Stepper(name) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for turn in range(options.periods + 1):
        for name, stepper in steppers.items():
            value = stepper.period(tokens(0))
            if turn:
                seconds[name].append(value)
    ratios = {n: [a / b for a, b in zip(seconds[n], seconds["full"], strict=True)] for n in NAMES[1:]}
    result = {
        "benchmark": "search step against a plain training step",
        "target_ratio_at_most": {"time": TARGET, "memory": TARGET},
        "time_ratios": {n: {"median": statistics.median(r), "least": min(r), "largest": max(r)} for n, r in ratios.items()},
        "memory_ratios": {n: memory[n] / memory["full"] for n in NAMES[1:]},
        "processor_seconds_a_step": {n: statistics.median(s) for n, s in seconds.items()},
        "peak_bytes_above_libraries": memory,
        "loss_difference_between_modes": difference,
        "setting": {
            "vocabulary": VOCABULARY, "batch": BATCH, "context": CONTEXT, "layers": LAYERS, "width": WIDTH, "seed": 0,
            "feed_forward": FEED_FORWARD, "candidates": CANDIDATES, "arch_every": ARCH_EVERY, "precision": "float32",
            "threads": torch.get_num_threads(), "periods": options.periods,
        },
        "versions": versions(),
    }  # fmt: skip
    for name in NAMES[1:]:
        time_ratio, memory_ratio = statistics.median(ratios[name]), memory[name] / memory["full"]
        print(f"{name}: {time_ratio:.2f} x the time and {memory_ratio:.2f} x the memory of a plain step")
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
