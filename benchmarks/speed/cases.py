"""One case, a size and a number of threads, in a process of its own: make the models, check them, let all systems take their turns."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import mixbits.hf
from mixbits.engine import Engine
from mixbits.kernels import cpu
from speed import gemv, peer, stalls
from speed.models import SIZES, Family, configuration, dense_twin, write_random_packed
from speed.systems import (
    LENGTH,
    SEQUENCES,
    check,
    compare,
    engine_systems,
    timed_score,
    torch_score,
    torch_systems,
)
from speed.timing import interleave

BITS = (1, 1.58, 2, 3, 4, 8)
TORCH_KINDS = ("torch-fp32", "torch-bf16", "torch-compile", "dynamic-int8")


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def token_ids(size: str, seed: int) -> torch.Tensor:
    """The batch to score, (SEQUENCES, LENGTH + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES[size].vocabulary, (SEQUENCES, LENGTH + 1), generator=generator)


def packed_directory(work: Path, size: str, family: Family, bits: float, seed: int) -> Path:
    """The packed directory with random codes, made when it is not there."""
    directory = work / f"{size}-{family}-{bits:g}"
    if not (directory / "config.json").is_file():
        write_random_packed(configuration(SIZES[size], family), bits, directory, seed=seed)
    return directory


def _family(job: dict[str, Any], family: Family, bits: tuple[float, ...], kinds: set[str]) -> dict[str, Any]:
    """Seconds of all systems of one family, and the checks that came before."""
    work, size, seed = Path(job["work"]), job["size"], job["seed"]
    ids = token_ids(size, seed)
    engines, checks, dense, drop_in = {}, {}, None, None
    for width in bits:
        directory = packed_directory(work, size, family, width, seed)
        packed = mixbits.hf.load(directory)
        engines[f"engine-{width:g}"] = Engine(directory)
        checks[f"{family} {width:g}"] = check(directory, packed, engines[f"engine-{width:g}"], ids)
        if width == 2:
            dense = dense_twin(packed)
            drop_in = mixbits.hf.load(directory, kernels="int8")
            with torch.inference_mode():
                wanted = torch_score(packed, ids[:4])
                compare(torch_score(dense, ids[:4]), wanted, "float32", "the dense model")
                checks[f"{family} drop-in 2"] = compare(torch_score(drop_in, ids[:4]), wanted, "int8", "drop-in layers")
        del packed
    found: dict[str, Any] = {"checks": checks}
    parts = [torch_systems(dense, ids, kinds), engine_systems(engines, ids)]
    parts.append({"score": {"drop-in-2": timed_score(lambda: torch_score(drop_in, ids))}, "decode": {}})
    other = None
    try:
        if family == "llama" and job["llama_python"]:
            other, found["llama.cpp"] = _peer(job, dense, ids)
            if other is not None:
                parts.append(peer.systems(other, list(found["llama.cpp"]["bytes"]), ids))
        for what in ("score", "decode"):
            say(f" {family}, {what}:")
            systems = {name: run for part in parts for name, run in part[what].items()}
            found[what] = interleave(systems, rounds=job["rounds"], budget_seconds=job["budget"], say=say)
    finally:
        if other is not None:
            other.close()
    if family == "opt" and job["full"]:
        say(" steps beside a busy core")
        found["steps"] = stalls.step_times(engines["engine-2"], dense, steps=job["steps"])
    return found


def _peer(job: dict[str, Any], dense: Any, ids: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """The peer with its models loaded, or None and why not."""
    folder = Path(job["work"]) / f"{job['size']}-gguf"
    other = None
    try:
        other = peer.Peer(job["llama_python"])
        found = peer.prepare(other, dense, ids, folder, threads=job["threads"])
        return other, {**found, "versions": other.versions}
    except (RuntimeError, OSError) as error:
        if other is not None:
            other.close()
        return None, {"bytes": {}, "missing": f"llama.cpp could not be run: {str(error)[:300]}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The whole case. ``job``: size, threads, full, rounds, budget, steps, seed, work, skip, llama_python."""
    torch.set_num_threads(job["threads"])
    cpu.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    kinds = set(TORCH_KINDS) - set(job["skip"])
    if not job["full"]:
        kinds.discard("torch-compile")
    return {
        "threads": {"torch": torch.get_num_threads(), "mixbits": cpu.num_threads()},
        "isa": cpu.isa(),
        "opt": _family(job, "opt", BITS if job["full"] else (2,), kinds),
        "llama": _family(job, "llama", (2,), kinds & {"torch-fp32"}),
    }


def run_kernels(job: dict[str, Any]) -> dict[str, Any]:
    """Single products: from DRAM, AVX2 against VNNI, arithmetic rates."""
    torch.set_num_threads(job["threads"])
    cpu.set_num_threads(job["threads"])
    small: dict[str, Any] = {"side": 512} if job["size"] == "tiny" else {}
    few = {**small, "num_bytes": 16 << 20} if small else {}
    say(" products from DRAM")
    dram = gemv.dram(job["threads"], rounds=job["rounds"], **few)
    say(" products in cache")
    return {
        "dram": dram,
        "avx2_against_vnni": gemv.avx2_against_vnni(rounds=job["rounds"], **small),
        "rates": gemv.rates(rounds=min(job["rounds"], 7), **small),
    }
