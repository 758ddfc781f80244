"""Our side of the peer: starts llama_peer.py in the given interpreter, hands it the dense weights, checks it, takes its turns."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speed.systems import TIMED_STEPS, WARM_STEPS

TYPES = ("F32", "Q4_0", "Q8_0", "Q2_K", "Q3_K_S", "Q4_K_S", "TQ1_0", "TQ2_0")
F32_TOLERANCE = 0.02  # of logits whose standard deviation is about 2; llama.cpp keeps keys and values in float16


class Peer:
    """The server process. Raises RuntimeError with its words where something fails."""

    def __init__(self, python: str) -> None:
        script = str(Path(__file__).with_name("llama_peer.py"))
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.versions = self.ask(do="versions")

    def ask(self, **command: Any) -> dict[str, Any]:
        """One command, one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            raise RuntimeError(f"the peer ended: {self.process.stderr.read()[-500:].strip()}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def _dense_arrays(model: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.named_parameters() if not name.startswith("lm_head")}


def prepare(peer: Peer, dense: Any, ids: torch.Tensor, folder: Path, *, threads: int) -> dict[str, Any]:
    """Write, quantize and load all types; check F32. Returns {"bytes": {type: file bytes}, "failed": {type: why}, "f32_difference"}."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dense.config
    source, paths = folder / "dense.npz", {kind: str(folder / f"{kind}.gguf") for kind in TYPES}
    np.savez(source, **_dense_arrays(dense))
    fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size",
              "max_position_embeddings", "rms_norm_eps", "vocab_size")  # fmt: skip
    facts = {name: getattr(config, name) for name in fields} | {"rope_theta": config.rope_parameters["rope_theta"]}
    found: dict[str, Any] = {"bytes": {}, "failed": {}}
    for kind in TYPES:
        try:
            if kind == "F32":
                reply = peer.ask(do="write", source=str(source), path=paths[kind], config=facts)
            else:
                reply = peer.ask(do="quantize", source=paths["F32"], path=paths[kind], kind=kind)
            sequences, length = ids.shape[0], ids.shape[1] - 1
            peer.ask(do="load", kind=kind, path=paths[kind], threads=threads, sequences=sequences, length=length,
                     context=config.max_position_embeddings)  # fmt: skip
            found["bytes"][kind] = reply["bytes"]
        except RuntimeError as error:
            if kind == "F32":
                raise
            found["failed"][kind] = str(error)[:300]
    source.unlink()
    found["f32_difference"] = _check(peer, dense, ids, folder / "check.npz")
    return found


def _check(peer: Peer, dense: Any, ids: torch.Tensor, path: Path) -> float:
    """Largest difference of logits, of steps and of the last position of a batch. Raises SystemExit beyond the tolerance."""
    rows = ids[:, :-1]
    peer.ask(
        do="check",
        kind="F32",
        tokens=ids.flatten()[:4].tolist(),
        rows=rows.tolist(),
        at=rows.numel() - 1,
        path=str(path),
    )
    with np.load(path) as found, torch.inference_mode():
        steps = dense(input_ids=ids.flatten()[None, :4]).logits[0].numpy()
        last = dense(input_ids=rows[-1:]).logits[0, -1].numpy()
        difference = max(float(np.abs(found["steps"] - steps).max()), float(np.abs(found["row"] - last).max()))
    if not difference < F32_TOLERANCE:
        raise SystemExit(
            f"llama.cpp in F32 differs from transformers by {difference:.3g}; allowed is {F32_TOLERANCE}. No result is written"
        )
    return difference


def systems(peer: Peer, kinds: list[str], ids: torch.Tensor) -> dict[str, dict[str, Callable[[], float]]]:
    """{"score": {"llama.cpp-Q4_0": seconds of a batch, ...}, "decode": {...: seconds of a step}}."""
    rows, tokens = ids[:, :-1].tolist(), ids.flatten()[: WARM_STEPS + TIMED_STEPS].tolist()
    score: dict[str, Callable[[], float]] = {}
    decode: dict[str, Callable[[], float]] = {}
    for kind in kinds:
        score[f"llama.cpp-{kind}"] = lambda kind=kind: peer.ask(do="score", kind=kind, rows=rows)["seconds"]  # type: ignore[misc]
        decode[f"llama.cpp-{kind}"] = lambda kind=kind: peer.ask(
            do="decode", kind=kind, tokens=tokens, warm=WARM_STEPS
        )["seconds"]  # type: ignore[misc]
    return {"score": score, "decode": decode}
