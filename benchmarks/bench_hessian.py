"""Time and memory of a Hessian trace of all units against a training step, at 2 and 8 layers.

Time: forward-backward passes over the same tokens a probe costs (the limit is 3), CPU seconds of one thread, so that other
processes on the machine disturb little; forward-backward passes are timed before, between and after. Memory: peak
resident memory above that of the loaded model, each in a process of its own, over that of AdamW training steps on all tokens at once.

    python benchmarks/bench_hessian.py

Writes results/bench_hessian.json. Correctness comes first: exact traces are what tests/quant/test_curvature.py compares with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from mixbits.quant.curvature import double_backward_ready, hessian_traces
from mixbits.quant.units import find_units
from mixbits.runs import versions, write_json

SHAPE = {"vocab_size": 5000, "hidden_size": 256, "ffn_dim": 512, "num_attention_heads": 8, "blocks": 32, "context": 64}


def make(layers: int) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=SHAPE["vocab_size"], hidden_size=SHAPE["hidden_size"], word_embed_proj_dim=SHAPE["hidden_size"],
        ffn_dim=SHAPE["ffn_dim"], num_hidden_layers=layers, num_attention_heads=SHAPE["num_attention_heads"],
        max_position_embeddings=SHAPE["context"], do_layer_norm_before=False, dropout=0.0, pad_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, SHAPE["vocab_size"], (SHAPE["blocks"], SHAPE["context"] + 1))
    return OPTForCausalLM(config).eval(), ids


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].reshape(-1))


def forward_backward(model: Any, ids: torch.Tensor, *, repeats: int = 3) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        loss(model, ids).backward()
        times.append(time.process_time() - start)
        model.zero_grad()
    return times


def measure_time(layers: int, probes: int, micro_batch_size: int) -> dict[str, Any]:
    model, ids = make(layers)
    inventory = find_units(model)
    forward_backward(model, ids)
    passes, per_probe, wall = [], [], []
    for _ in range(2):
        passes += forward_backward(model, ids)
        start, started = time.process_time(), time.perf_counter()
        with double_backward_ready(model):
            hessian_traces(
                model, inventory, [ids], loss, num_probes=probes // 2, seed=0, micro_batch_size=micro_batch_size
            )
        per_probe.append((time.process_time() - start) / (probes // 2))
        wall.append((time.perf_counter() - started) / (probes // 2))
    passes += forward_backward(model, ids)
    unit = statistics.median(passes)
    return {
        "layers": layers,
        "units": len(inventory.units),
        "forward_backward_seconds": unit,
        "forward_backward_spread": [min(passes), max(passes)],
        "probe_seconds": statistics.mean(per_probe),
        "probe_wall_seconds": statistics.mean(wall),
        "forward_backwards_per_probe": statistics.mean(per_probe) / unit,
    }


def peak_above_model(job: str, layers: int, micro_batch_size: int) -> float:
    """MiB, in a fresh process."""
    command = [sys.executable, __file__, "--job", job, "--layers", str(layers), "--micro-batch", str(micro_batch_size)]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def peak_mib() -> float:
    """Peak resident memory of this process (Linux; getrusage would also remember the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def memory_job(job: str, layers: int, micro_batch_size: int) -> float:
    model, ids = make(layers)
    with torch.no_grad():
        loss(model, ids[:1])
    before = peak_mib()
    if job == "train":
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            loss(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    else:
        with double_backward_ready(model):
            hessian_traces(
                model, find_units(model), [ids], loss, num_probes=3, seed=0, micro_batch_size=micro_batch_size
            )
    return peak_mib() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("results/bench_hessian.json"))
    parser.add_argument("--job", choices=["train", "hessian"])
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.job:
        print(memory_job(args.job, args.layers, args.micro_batch))
        return
    rows = []
    for layers in (2, 8):
        train, hessian = (peak_above_model(job, layers, args.micro_batch) for job in ("train", "hessian"))
        row = measure_time(layers, args.probes, args.micro_batch)
        row |= {"train_step_peak_mib": train, "hessian_peak_mib": hessian, "memory_ratio": hessian / train}
        print(
            f"{layers} layers, {row['units']} units: {row['forward_backwards_per_probe']:.2f} forward-backwards a probe "
            f"(limit 3), memory {row['memory_ratio']:.2f} training steps (limit 3)"
        )
        rows.append(row)
    note = "CPU seconds of one thread on a shared machine: only the ratios of one run mean anything"
    settings = {"probes": args.probes, "micro_batch_size": args.micro_batch, **SHAPE}
    write_json(args.output, {"note": note, "settings": settings, "rows": rows, "versions": versions()})


if __name__ == "__main__":
    main()
