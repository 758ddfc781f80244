"""Loading a packed model of about 100 MB: seconds beyond the imports, and memory over what the process had before.

The weights are random codes in a temporary folder, written without ever making the model's full-precision weights. Limits: 0.5 s,
and at rest less than 1.5 times the packed bytes (of which all pages are touched first: until then they are only mapped). Correctness
first: the loaded tensors are compared with the file's. Each load is timed in a fresh process, which has imported mixbits.hf and loaded
a tiny model; the file is in the system's cache. Beside the whole, the share of what is ours: checks of header, values and checksums.
Processor seconds stand beside those of the clock, which other work on the machine makes longer (``load_average``).

    python benchmarks/bench_load.py [--repeats 7]

Writes results/bench_load.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import mixbits.hf
from mixbits.packing.archive import archive_packed
from mixbits.packing.checkpoint import describe
from mixbits.packing.verify import verify_packed
from mixbits.packing.weightset import write_weights
from mixbits.quant.units import find_units
from mixbits.runs import versions, write_json
from mixbits.spec import BitAllocation, QuantSpec, StoredTensor, stored_tensors

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, str, dict[str, int]]] = {
    "opt, 2 bits": ("opt", "2", {"hidden_size": 2048, "num_hidden_layers": 8}),
    "opt, 1.58 bits, groups of 64, 8-bit scales": ("opt", "1.58-g64-s8", {"hidden_size": 2048, "num_hidden_layers": 9}),
    "opt, 3 bits": ("opt", "3", {"hidden_size": 1536, "num_hidden_layers": 9}),
    "llama, 4 bits": ("llama", "4", {"hidden_size": 1152, "num_hidden_layers": 12}),
}
TINY = ("opt", "2", {"hidden_size": 64, "num_hidden_layers": 1})


def make(directory: Path, family: str, spec: str, sizes: dict[str, int], seed: int = 0) -> int:
    """Write a packed model of random valid codes; returns the bytes of its weight file."""
    d = sizes["hidden_size"]
    common: dict[str, Any] = {"vocab_size": 10_000, "num_attention_heads": d // 64, "max_position_embeddings": 1024}
    common |= {**sizes, **SPECIAL}
    with torch.device("meta"):
        if family == "opt":
            model: Any = OPTForCausalLM(OPTConfig(ffn_dim=4 * d, word_embed_proj_dim=d, **common))
        else:
            model = LlamaForCausalLM(LlamaConfig(intermediate_size=4 * d, tie_word_embeddings=True, **common))
    model.tie_weights()
    inventory = find_units(model)
    allocation = BitAllocation.uniform(inventory, QuantSpec.parse(spec))
    generator = torch.Generator().manual_seed(seed)
    widths = {u.weight: allocation.specs[u.name].code_bits for u in inventory.units}

    def numbers(stored: StoredTensor) -> torch.Tensor:
        if stored.dtype == "F16":
            return torch.rand(stored.shape, generator=generator).half()
        top = {1.58: 243, 8: 255}.get(widths.get(stored.name, 0), 256)
        found = torch.randint(
            0 if stored.name in widths else 1, top, stored.shape, generator=generator, dtype=torch.uint8
        )
        # Three and four bits: some bits cleared, so that no code is the one that is no level.
        found &= {3: 0b01010101, 4: 0x77}.get(widths.get(stored.name, 0), 255)
        if stored.name in widths:
            found[-1] = 0  # bits left over
        return found

    stored = stored_tensors(inventory, allocation)
    directory.mkdir()
    written = write_weights(directory, stored, {t.name: numbers(t) for t in stored})
    config = model.config
    config.quantization_config = describe(inventory, allocation, written.file_bytes, written.checksums)
    config.architectures, config.dtype = [type(model).__name__], "float32"
    config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    return written.file_bytes


def resident_bytes() -> dict[str, int]:
    """Memory of this process: all that is resident, what of it belongs to no file, and the most it has been."""
    found = {"resident": 0, "anonymous": 0}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in ("Rss", "Anonymous"):
            found["resident" if key == "Rss" else "anonymous"] = 1024 * int(value.split()[0])
    status = Path("/proc/self/status").read_text()
    peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return found | {"peak": 1024 * int(peak[0]) if peak else found["resident"]}


def measure_here(directory: Path, tiny: Path) -> dict[str, Any]:
    """One load in this process. The model at rest has all its pages touched."""
    mixbits.load(tiny)
    before = resident_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    model = mixbits.load(directory)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    tensors = dict(model.state_dict())
    touched = sum(int(t.view(torch.uint8).view(-1)[::1024].max()) for t in tensors.values() if t.numel())  # all pages
    after = resident_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    weights, _ = verify_packed(directory)
    verify_seconds, verify_cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    reader = weights.reader()
    for stored in weights.tensors:
        assert torch.equal(tensors[stored.name].to(reader.tensor(stored).dtype), reader.tensor(stored)), stored.name
    assert touched > 0
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "verify_seconds": verify_seconds,
        "verify_cpu_seconds": verify_cpu_seconds,
        **{f"{key}_growth_bytes": after[key] - before[key] for key in before},
    }


def measure(directory: Path, tiny: Path, repeats: int) -> dict[str, Any]:
    """Several loads, each in a process of its own."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--one", str(directory), str(tiny)]
        runs.append(
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        )
    seconds = [run["seconds"] for run in runs]
    packed = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    return {
        "packed_bytes": packed,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "cpu_seconds_median": statistics.median(run["cpu_seconds"] for run in runs),
        "verify_seconds_median": statistics.median(run["verify_seconds"] for run in runs),
        "verify_cpu_seconds_median": statistics.median(run["verify_cpu_seconds"] for run in runs),
        "resident_over_packed_bytes": max(run["resident_growth_bytes"] for run in runs) / packed,
        "anonymous_over_packed_bytes": max(run["anonymous_growth_bytes"] for run in runs) / packed,
        "peak_over_packed_bytes": max(run["peak_growth_bytes"] for run in runs) / packed,
    }


def measure_archive(directory: Path) -> dict[str, Any]:
    """Processor seconds to archive the model and to load it so. What random codes save says nothing."""
    packed, start = sum(p.stat().st_size for p in directory.glob("*.safetensors")), time.process_time()
    archive_packed(directory)
    archive_seconds, start = time.process_time() - start, time.process_time()
    mixbits.load(directory)
    load_seconds = time.process_time() - start
    return {"packed_bytes": packed, "archive_cpu_seconds": archive_seconds, "load_cpu_seconds": load_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--one", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_here(*arguments.one)))
        return
    root = Path(__file__).resolve().parent.parent
    found: dict[str, Any] = {
        "title": "Loading packed models",
        "limits": {"seconds": 0.5, "resident_over_packed_bytes": 1.5},
    }
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "tiny", *TINY)
        for number, (name, how) in enumerate(MODELS.items()):
            directory = Path(folder) / str(number)
            make(directory, *how)
            found[name] = measure(directory, Path(folder) / "tiny", arguments.repeats)
            print(name, json.dumps(found[name], indent=1))
        found[f"{name}, archived"] = measure_archive(directory)
        print(json.dumps(found[f"{name}, archived"], indent=1))
    found |= {"cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "versions": versions()}
    write_json(root / "results" / "bench_load.json", found)


if __name__ == "__main__":
    main()
