"""Speed and memory of packed models on this machine's processor against PyTorch and llama.cpp; one key a cell of the table.

What is compared (benchmarks/README.md says how to read and to run it): decoding one stream and scoring 16 x 32 tokens by the native
engine, against PyTorch in float32, bfloat16, compiled and with dynamic int8, against llama.cpp's best quantized type (Llama models
of the same size, the same weights); drop-in packed layers; single products against the read bandwidth and the int8 peak; peak memory;
perplexity with int8 activations; step times beside a busy core. Everything is checked against the packed model in PyTorch first; if that
fails nothing is written. Weights are random, but for perplexity. Systems take turns; a ratio is the median over rounds, with its spread.

A cell that cannot be measured here is null, with the reason in ``missing``. ``quiet`` says whether the machine was otherwise idle: figures
with ``quiet: false`` are for trying the benchmark out only.

Usage: python benchmarks/bench_speed.py [--llama-python PYTHON] [--quality-model DIRECTORY] [--output results/speed.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mixbits.kernels import cpu
from mixbits.runs import versions, write_json
from speed import cells, memory, quality
from speed.cases import packed_directory, run, run_kernels, say, token_ids
from speed.models import MAIN, SIZES
from speed.systems import LENGTH, SEQUENCES, TIMED_STEPS, TOLERANCES, WARM_STEPS
from speed.timing import Quiet


def _job(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a process of its own, with its number of threads from the start."""
    environment = dict(
        os.environ, OMP_NUM_THREADS=str(job["threads"]), MIXBITS_THREADS=str(job["threads"]), HF_HUB_OFFLINE="1"
    )
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, __file__, "--job", json.dumps({**job, "answer": answer.name})]
        if subprocess.run(command, env=environment).returncode:
            raise SystemExit(f"{job['what']} {job['size']} with {job['threads']} threads failed; no result is written")
        return json.loads(Path(answer.name).read_text())


def _do(job: dict[str, Any]) -> None:
    """In the other process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if "memory" in job:
        import torch

        torch.set_num_threads(job["threads"])
        ids = token_ids("tiny", job["seed"])
        print(json.dumps(memory.measure_here(job["memory"], Path(job["directory"]), Path(job["tiny"]), ids)))
        return
    found = {"case": run, "kernels": run_kernels}[job["what"]](job)
    Path(job["answer"]).write_text(json.dumps(found))


def _threads() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return min(2, len(affinity(0)) if affinity else os.cpu_count() or 1)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All jobs one after the other, as plain data."""
    most = options.threads
    common = {"seed": options.seed, "work": str(work), "skip": options.skip, "llama_python": options.llama_python,
              "budget": options.budget, "steps": options.steps}  # fmt: skip
    found: dict[str, Any] = {"cases": {}}
    plan = [(options.main, most)] + [
        (size, n) for size in options.sizes for n in sorted({1, most}) if (size, n) != (options.main, most)
    ]
    if most > 1 and (options.main, 1) not in plan:
        plan.insert(1, (options.main, 1))
    for size, threads in plan:
        full = (size, threads) == (options.main, most)
        say(f"{size}, {threads} threads")
        job = {**common, "what": "case", "size": size, "threads": threads, "full": full,
               "rounds": options.rounds if full else max(3, options.rounds // 2)}  # fmt: skip
        found["cases"][f"{size}, {threads} threads"] = _job(job)
    say("single products")
    found["kernels"] = _job(
        {**common, "what": "kernels", "size": options.main, "threads": most, "rounds": options.rounds}
    )
    say("memory")
    directory, tiny = (packed_directory(work, size, "opt", 2, options.seed) for size in (options.main, "tiny"))
    found["memory"] = memory.compare(directory, tiny, script=__file__, threads=most, seed=options.seed)
    say("perplexity")
    found["perplexity"] = quality.int8_change(options.quality_model, options.quality_text)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns to time, after one of warm-up")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds a system may take in all; slower ones get fewer rounds"
    )
    parser.add_argument("--steps", type=int, default=2000, help="decoding steps timed one by one beside a busy core")
    parser.add_argument(
        "--threads", type=int, default=_threads(), help="threads of the table (default: 2, if there are as many cores)"
    )
    parser.add_argument("--main", choices=SIZES, default=MAIN, help="size of the table")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["8M", "100M", "300M"], help="further sizes")
    parser.add_argument("--skip", nargs="*", default=[], help="PyTorch systems to leave out, e.g. torch-bf16")
    parser.add_argument("--llama-python", default=None, help="interpreter with llama-cpp-python and gguf")
    parser.add_argument("--quality-model", type=Path, default=None, help="trained packed model for the perplexity cell")
    parser.add_argument(
        "--quality-text", type=Path, default=None, help="its text (default: ptb/ptb.test.txt in MIXBITS_DATA)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="folder for models, kept (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--job", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = _options()
    if options.job:
        _do(json.loads(options.job))
        return
    quiet = Quiet()
    with tempfile.TemporaryDirectory(prefix="mixbits-speed-") as folder:
        found = measure(options, options.work or Path(folder))
    table = cells.table(found, f"{options.main}, {options.threads} threads", options)
    result = {
        "benchmark": "speed and memory of packed models on a CPU",
        **quiet.result(),
        **table,
        "setting": {
            "main": options.main, "threads": options.threads, "instruction_set": cpu.isa(), "instruction_sets": cpu.isas(),
            "bfloat16_arithmetic": cells.has_bfloat16(), "sequences": SEQUENCES, "length": LENGTH, "warm_steps": WARM_STEPS,
            "timed_steps": TIMED_STEPS, "rounds": options.rounds, "budget_seconds": options.budget, "seed": options.seed,
            "tolerances_nats": {k: {"largest": a, "root_mean_square": b} for k, (a, b) in TOLERANCES.items()},
            "sizes": {name: vars(SIZES[name]) for name in {options.main, *options.sizes}},
        },
        "measured": found,
        "versions": versions(),
    }  # fmt: skip
    for name, value in result["ratios"].items():
        wanted = result["targets"].get(name)
        shown = f"null ({result['missing'][name]})" if value is None else f"{value:.4g}"
        print(f"{name}: {shown}{f', wanted {wanted}' if wanted else ''}")
    print(f"quiet machine: {result['quiet']}")
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
