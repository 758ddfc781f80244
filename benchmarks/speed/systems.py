"""What is timed: a language model in PyTorch (several ways), as drop-in packed layers, and in the native engine; and the check.

Scoring: a batch of sequences of equal length, which gives padding nothing to do; the result is the log-probability of every token after
the first. PyTorch takes full logits and its fused cross-entropy. Decoding: one stream, one token a step, key-value cache, logits of
every step; torch.compile gets a static cache and keeps its graph.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mixbits.engine import Engine

SEQUENCES, LENGTH = 16, 32  # 512 positions, as rescoring of n-best lists has them
WARM_STEPS, TIMED_STEPS = 4, 32
TOLERANCES = {
    # Largest and root-mean-square difference of log-probabilities (decoding: of logits) from the packed model in PyTorch, in nats.
    "float32": (1e-3, 3e-4),
    "int8": (1.0, 0.2),  # random weights: logits of standard deviation 2; 0.08 root mean square seen at 36.6M
}
Array = np.ndarray


def torch_score(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) log-probabilities of ids[:, 1:]."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    nll = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return -nll.view(ids.shape[0], -1)


def torch_decode(forward: Any, config: Any, tokens: torch.Tensor, *, static: bool) -> tuple[list[torch.Tensor], float]:
    """Logits of each step and the seconds of a step, the first ones not counted."""
    from transformers import DynamicCache, StaticCache

    length = WARM_STEPS + TIMED_STEPS
    cache: Any = StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)
    logits, started = [], 0.0
    for i in range(len(tokens)):
        if i == WARM_STEPS:
            started = time.perf_counter()
        extra = {"position_ids": torch.tensor([[i]])} if static else {}
        out = forward(input_ids=tokens[i].view(1, 1), past_key_values=cache, use_cache=True, **extra)
        logits.append(out.logits[0, -1])
    return logits, (time.perf_counter() - started) / (len(tokens) - WARM_STEPS)


def engine_decode(engine: Engine, tokens: Array, logits: Array) -> float:
    """Seconds of a step; ``logits`` (1, V) is written to."""
    engine.reset()
    stream, started = np.zeros(1, dtype=np.int64), 0.0
    for i in range(len(tokens)):
        if i == WARM_STEPS:
            started = time.perf_counter()
        engine.step(tokens[i : i + 1], stream, out=logits)
    return (time.perf_counter() - started) / (len(tokens) - WARM_STEPS)


def dynamic_int8(model: nn.Module) -> nn.Module:
    """PyTorch's own dynamic int8 quantization of every nn.Linear, output layer included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = copy.deepcopy(model)
        twin.get_output_embeddings().weight = nn.Parameter(twin.get_output_embeddings().weight.detach().clone())
        return torch.ao.quantization.quantize_dynamic(twin, {nn.Linear}, dtype=torch.qint8)


def torch_systems(dense: Any, ids: torch.Tensor, kinds: set[str]) -> dict[str, dict[str, Callable[[], float]]]:
    """{"score": {name: seconds of a batch}, "decode": {name: seconds of a step}} of the PyTorch systems in ``kinds``."""
    models: dict[str, Any] = {}
    if "torch-fp32" in kinds:
        models["torch-fp32"] = dense
    if "torch-bf16" in kinds:
        models["torch-bf16"] = copy.deepcopy(dense).to(torch.bfloat16)
    if "dynamic-int8" in kinds:
        models["dynamic-int8"] = dynamic_int8(dense)
    score: dict[str, Callable[[], float]] = {}
    decode: dict[str, Callable[[], float]] = {}
    for name, model in models.items():
        score[name] = timed_score(lambda model=model: torch_score(model, ids))  # type: ignore[misc]
        decode[name] = _timed_decode(model, model.config, ids, static=False)
    if "torch-compile" in kinds:
        compiled = torch.compile(torch_score, dynamic=False)
        score["torch-compile"] = timed_score(lambda: compiled(dense, ids))
        decode["torch-compile"] = _timed_decode(torch.compile(dense, dynamic=False), dense.config, ids, static=True)
        for one in (score, decode):
            one["torch-compile"]()  # compiles: no part of any time
    return {"score": score, "decode": decode}


def timed_score(work: Callable[[], Any]) -> Callable[[], float]:
    """The seconds of one call without gradients."""

    def run() -> float:
        with torch.inference_mode():
            started = time.perf_counter()
            work()
            return time.perf_counter() - started

    return run


def _timed_decode(forward: Any, config: Any, ids: torch.Tensor, *, static: bool) -> Callable[[], float]:
    tokens = ids.flatten()[: WARM_STEPS + TIMED_STEPS]

    def run() -> float:
        with torch.no_grad():
            return torch_decode(forward, config, tokens, static=static)[1]

    return run


def engine_systems(engines: dict[str, Engine], ids: torch.Tensor) -> dict[str, dict[str, Callable[[], float]]]:
    """As :func:`torch_systems`, of native engines by name."""
    sequences = ids.tolist()
    tokens = ids.flatten()[: WARM_STEPS + TIMED_STEPS].numpy()
    score, decode = {}, {}
    for name, engine in engines.items():
        logits = np.empty((1, engine.vocabulary_size), dtype=np.float32)
        engine.open_streams(1)
        score[name] = timed_score(lambda engine=engine: engine.score(sequences))  # type: ignore[misc]
        decode[name] = lambda engine=engine, logits=logits: engine_decode(engine, tokens, logits)  # type: ignore[misc]
    return {"score": score, "decode": decode}


class _Chains:
    """Sequences as a forest of single paths."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.tokens = ids.flatten().numpy()
        self.parents = np.arange(len(self.tokens)) - 1
        self.parents[:: ids.shape[1]] = -1


def node_scores(engine: Engine, ids: torch.Tensor) -> Array:
    """(B, T) log-probabilities of ids[:, 1:] by the engine."""
    return engine.score_forest(_Chains(ids)).reshape(ids.shape)[:, 1:]


def compare(found: Any, wanted: Any, tolerance: str, what: str) -> dict[str, float]:
    """Largest and root-mean-square difference. Raises SystemExit, so that nothing is written, beyond the tolerance."""
    difference = np.asarray(found, dtype=np.float64) - np.asarray(wanted, dtype=np.float64)
    largest, rms = float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)))
    if not (largest <= TOLERANCES[tolerance][0] and rms <= TOLERANCES[tolerance][1]):
        raise SystemExit(
            f"{what}: differs from the packed model in PyTorch by at most {largest:.3g} and {rms:.3g} root mean square; allowed are "
            f"{TOLERANCES[tolerance]}. No result is written"
        )
    return {"largest": largest, "root_mean_square": rms}


def check(directory: Path, packed: Any, engine: Engine, ids: torch.Tensor) -> dict[str, Any]:
    """Engine in both modes against the packed model in PyTorch (unpacked weights, float32): scores and logits of steps."""
    some, tokens = ids[:4], ids.flatten()[:8]
    with torch.inference_mode():
        wanted = torch_score(packed, some).numpy()
        steps = packed(input_ids=tokens[None], use_cache=False).logits[0].numpy()
    exact = Engine(directory, activations="float32")
    checked = {}
    for name, one in (("float32", exact), ("int8", engine)):
        one.open_streams(1)
        logits = np.concatenate([one.step(tokens[i : i + 1].numpy()) for i in range(len(tokens))])
        checked[name] = {
            "score": compare(node_scores(one, some), wanted, name, f"{directory.name}, {name} activations, scoring"),
            "step": compare(logits, steps, name, f"{directory.name}, {name} activations, decoding"),
        }
    return checked
