"""Peak memory while a batch is scored, interpreter and libraries aside: the native engine against PyTorch in float32.

Each system runs in a process of its own: import everything, score once with a tiny model of the same kind (whatever a first call
loads), note the resident bytes, load the model, score. Peak is the kernel's high-water mark, reset after loading (``scoring``; the
weights are in it, loading's own buffers are not) or never (``with_loading``). PyTorch's model is made in memory with random weights, so no
file pages count against it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from speed.systems import torch_score


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _load(kind: str, directory: Path) -> Any:
    """A callable that scores token ids."""
    if kind == "engine":
        from mixbits.engine import Engine

        engine = Engine(directory)
        return lambda ids: engine.score(ids.tolist())
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return lambda ids: torch_score(model, ids)


def measure_here(kind: str, directory: Path, tiny: Path, ids: torch.Tensor) -> dict[str, int]:
    """Bytes above the baseline; to be called in a fresh process."""
    import transformers.models.opt.modeling_opt  # noqa: F401 (imports are no part of the peak)

    import mixbits.hf  # noqa: F401

    with torch.inference_mode():
        score = _load(kind, tiny)
        score(ids[:2, :5] % 500)
        del score
        before = _status_bytes("VmRSS")
        _reset_peak()
        score = _load(kind, directory)
        loading = _status_bytes("VmHWM")
        _reset_peak()
        score(ids)
        scoring = _status_bytes("VmHWM")
    return {"baseline": before, "scoring": scoring - before, "with_loading": max(loading, scoring) - before}


def compare(directory: Path, tiny: Path, *, script: str, threads: int, seed: int) -> dict[str, Any] | str:
    """{"engine": bytes, "torch-fp32": bytes}; a reason in words where the kernel does not tell."""
    if not (sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"peak memory of a phase needs Linux's /proc/self/clear_refs (this process peaked at {peak})"
    found = {}
    for kind in ("engine", "torch-fp32"):
        job = {"memory": kind, "directory": str(directory), "tiny": str(tiny), "threads": threads, "seed": seed}
        run = subprocess.run([sys.executable, script, "--job", json.dumps(job)], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"measuring memory of {kind} failed: {run.stderr[-2000:]}")
        found[kind] = json.loads(run.stdout.splitlines()[-1])
    return found
