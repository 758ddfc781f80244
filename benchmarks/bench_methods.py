"""Training methods at equal steps on a tiny real task: validation loss of the delivered weights, against straight-through.

Penn Treebank cut to its 1,000 most frequent words, the paper preset with 2 layers, d 48, feed-forward 192, context 64, float32, no
dropout, no teacher. One full-precision model is trained; from it every method trains the same steps on the same batches, at one learning
rate; straight-through and plain ADMM at a second one too, of which the better counts, so that they are not beaten by the choice of it. The papers'
extra-gradient has rates of its own. Differences to straight-through are paired over validation blocks, with their standard error; a
seed is another order of the batches. No refinement.

Usage: MIXBITS_DATA=... OMP_NUM_THREADS=1 python benchmarks/bench_methods.py [--output results/bench_methods.json]
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixbits.lm.corpus import BlockDataset, TokenStream, encode, read_sentences
from mixbits.lm.loss import evaluation_mode, token_nll, training_loss
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import word_tokenizer
from mixbits.quant.admm import Admm
from mixbits.quant.progressive import Progressive
from mixbits.quant.proximal import Proximal
from mixbits.quant.qat import StraightThrough
from mixbits.quant.units import find_units
from mixbits.runs import versions, write_json
from mixbits.spec import BitAllocation, QuantSpec

WORDS, CONTEXT, BATCH, FULL_STEPS, STEPS = 1000, 64, 16, 1500, 300
SIZE = ModelSize(num_layers=2, hidden_size=48, feed_forward_size=192, num_heads=4, context=CONTEXT, dropout=0.0)
FULL_RATE, FULL_WARMUP, RATES, WARMUP = 3e-3, 0.15, (2e-3, 5e-3), 0.05
WEIGHT_DECAY, MAX_NORM, VALID_BLOCKS = 0.01, 1.0, 400

Build = Callable[..., Any]
METHODS: dict[str, tuple[Build, dict[str, Any]]] = {
    "straight-through": (StraightThrough, {}),
    "straight-through, learned scales": (StraightThrough, {"scales": "learned"}),
    "ADMM projected": (Admm, {}),
    "ADMM projected, no dual": (Admm, {"dual_step": 0.0}),
    "ADMM projected, gamma 2": (Admm, {"gamma": 2.0, "gamma_final": 2.0}),
    "ADMM adamw": (Admm, {"solver": "adamw"}),
    "ADMM adamw, balanced gamma": (Admm, {"solver": "adamw", "gamma_rule": "residual"}),
    "ADMM adamw, last half straight-through": (Admm, {"solver": "adamw", "finish_straight_through": 0.5}),
    "ADMM extragradient-adamw": (Admm, {"solver": "extragradient-adamw"}),
    "ADMM extragradient (papers)": (Admm, {"solver": "extragradient", "gamma": 1e-3, "gamma_rule": "constant", "num_updates": 20}),
    "proximal parq": (Proximal, {}),
    "proximal soft-threshold": (Proximal, {"kind": "soft-threshold"}),
    "proximal average": (Proximal, {"kind": "average"}),
    "progressive 8-4": (Progressive, {}),
}  # fmt: skip
BOTH_RATES = ("straight-through", "ADMM adamw")
SHORT = ("straight-through", "ADMM projected", "proximal parq", "progressive 8-4")


def batches(stream: TokenStream, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` batches of blocks in the order of a seed."""
    blocks, generator = BlockDataset(stream, CONTEXT), torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += torch.randperm(len(blocks), generator=generator).tolist()
    for step in range(steps):
        yield torch.stack([blocks[i]["input_ids"] for i in order[step * BATCH : (step + 1) * BATCH]])


def block_nats(model: Any, stream: TokenStream) -> np.ndarray:
    """Mean nats per token of each of the first validation blocks."""
    blocks, found = BlockDataset(stream, CONTEXT), []
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, VALID_BLOCKS, 50):
            rows = torch.stack([blocks[i]["input_ids"] for i in range(start, start + 50)])
            found.append(token_nll(model, rows).double().mean(1))
    return torch.cat(found).numpy()


def train(
    model: Any, method: Any, stream: TokenStream, steps: int, rate: float, seed: int, warmup: float = WARMUP
) -> None:
    """The trainer's steps: AdamW, clipped gradients, warm-up and cosine."""
    extra = method.extra_parameters(model) if hasattr(method, "extra_parameters") else []
    groups = [{"params": list(model.parameters())}, *({"lr": rate, **group} for group in extra)]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    warm = max(1, round(warmup * steps))
    shape = lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / (steps - warm)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    for step, ids in enumerate(batches(stream, steps, seed), 1):
        optimizer.zero_grad()
        if method is not None:
            method.before_forward(model)
        training_loss(model, ids).backward()
        if method is not None:
            method.after_backward(model)
            if hasattr(method, "second_gradient") and method.second_gradient(model):
                training_loss(model, ids).backward()
                method.after_backward(model)
        torch.nn.utils.clip_grad_norm_(stepped, MAX_NORM)
        optimizer.step()
        schedule.step()
        if method is not None:
            method.after_step(model, step, steps)


def run(
    full: Any, streams: tuple[TokenStream, TokenStream], spec: QuantSpec, name: str, rate: float, seed: int
) -> tuple[np.ndarray, float]:
    """Validation nats of every block after training with a method, and the processor seconds that took."""  # fmt: skip
    model = copy.deepcopy(full)
    inventory = find_units(model)
    build, options = METHODS[name]
    method = build(model, inventory, BitAllocation.uniform(inventory, spec), **options)
    start = time.process_time()
    train(model, method, streams[0], STEPS, rate, seed)
    seconds = time.process_time() - start
    with method.delivered(model):
        return block_nats(model, streams[1]), seconds


def compare(
    full: Any, streams: Any, spec: QuantSpec, names: tuple[str, ...], rates: tuple[float, ...], seed: int
) -> list[dict[str, Any]]:
    """One row a method: losses at each rate, the best one, its difference to straight-through's best."""  # fmt: skip
    rows, reference = [], None
    for name in names:
        tried = {
            rate: run(full, streams, spec, name, rate, seed) for rate in (rates if name in BOTH_RATES else rates[-1:])
        }
        best = min(tried, key=lambda rate: float(tried[rate][0].mean()))
        nats = tried[best][0]
        reference = nats if reference is None else reference
        difference = nats - reference
        rows.append(
            {
                "method": name, "spec": str(spec), "seed": seed, "valid_nats": float(nats.mean()), "learning_rate": best,
                "valid_nats_by_rate": {str(rate): float(found[0].mean()) for rate, found in tried.items()},
                "to_straight_through_nats": float(difference.mean()),
                "to_straight_through_stderr": float(difference.std(ddof=1) / math.sqrt(len(difference))),
                "seconds": tried[best][1],
            }
        )  # fmt: skip
        row = rows[-1]
        print(
            f"{spec} seed {seed} {name}: {row['valid_nats']:.4f} nats at {best:g}, to straight-through "
            f"{row['to_straight_through_nats']:+.4f} ± {row['to_straight_through_stderr']:.4f} ({row['seconds']:.0f} s)", flush=True
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=None, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["MIXBITS_DATA"]) / "ptb"
    tokenizer = word_tokenizer(read_sentences(folder / "ptb.train.txt"), max_words=WORDS, max_length=CONTEXT)
    streams = tuple(encode(tokenizer, read_sentences(folder / f"ptb.{part}.txt")) for part in ("train", "valid"))
    start = time.process_time()
    full = build_model(SIZE, tokenizer, seed=0)
    train(full, None, streams[0], FULL_STEPS, FULL_RATE, 0, FULL_WARMUP)
    full_nats = float(block_nats(full, streams[1]).mean())
    print(f"full precision: {full_nats:.4f} nats", flush=True)
    rows = compare(full, streams, QuantSpec(1.58), tuple(METHODS), RATES, 1)
    rows += compare(full, streams, QuantSpec(1.58), SHORT, RATES[1:], 2)
    rows += compare(full, streams, QuantSpec(2), SHORT, RATES[1:], 1)
    result = {
        "benchmark": "validation loss of training methods at equal steps, tiny Penn Treebank task",
        "full_valid_nats": full_nats,
        "rows": rows,
        "processor_seconds": time.process_time() - start,
        "setting": {
            "words": WORDS, "model": SIZE.model_dump(), "batch": BATCH, "full_steps": FULL_STEPS, "full_learning_rate": FULL_RATE, "full_warmup": FULL_WARMUP,
            "steps": STEPS, "learning_rates": RATES, "weight_decay": WEIGHT_DECAY, "warmup": WARMUP, "max_grad_norm": MAX_NORM,
            "valid_blocks": VALID_BLOCKS, "precision": "float32", "options": {name: o for name, (_, o) in METHODS.items()},
        },
        "data": {"train": streams[0].sha256, "valid": streams[1].sha256},
        "versions": versions(),
    }  # fmt: skip
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
