"""Times of single decoding steps, with and without another process that keeps one core busy.

A thread pool that spins, or that waits for a thread whose core was taken, shows as a long 99th percentile: stalls of 8-16 ms are usual
with OpenMP. The other process runs Python in a loop, at the same priority, bound to one of the cores this process may use.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mixbits.engine import Engine

_LENGTH = 100


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process loads a core meanwhile."""
    code = (
        "import os\nif hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "print(flush=True)\nwhile True: pass"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        time.sleep(0.2)
        yield
    finally:
        other.kill()
        other.wait()


def _engine_steps(engine: Engine, count: int) -> list[float]:
    logits, stream = np.empty((1, engine.vocabulary_size), dtype=np.float32), np.zeros(1, dtype=np.int64)
    token, times = np.array([5], dtype=np.int64), []
    for i in range(count):
        if i % _LENGTH == 0:
            engine.reset()
        started = time.perf_counter()
        engine.step(token, stream, out=logits)
        times.append(time.perf_counter() - started)
    return times


def _torch_steps(model: Any, count: int) -> list[float]:
    from transformers import DynamicCache

    token, times, cache = torch.tensor([[5]]), [], None
    with torch.no_grad():
        for i in range(count):
            if i % _LENGTH == 0:
                cache = DynamicCache(config=model.config)
            started = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - started)
    return times


def _figures(times: list[float]) -> dict[str, float]:
    values = np.array(times[10:]) * 1e3
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "longest_ms": float(values.max()),
        "steps": len(values),
    }


def step_times(engine: Engine, model: Any, *, steps: int) -> dict[str, Any]:
    """Percentiles of the time of a step by the engine and by PyTorch, alone and with a busy core."""
    work = {
        "engine": lambda: _figures(_engine_steps(engine, steps)),
        "torch-fp32": lambda: _figures(_torch_steps(model, max(50, steps // 10))),
    }
    found: dict[str, Any] = {name: {"alone": run()} for name, run in work.items()}
    with busy_core():
        for name, run in work.items():
            found[name]["one_core_busy"] = run()
    return found
