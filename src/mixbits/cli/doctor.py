"""``mixbits doctor``: what this machine and installation offer, and what is missing."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def main(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Show versions, the compiled kernels and their instruction set, threads, GPU and optional packages."""
    facts = _facts()
    if json:
        import json as json_module

        typer.echo(json_module.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    Console().print(table)


def _facts() -> dict[str, Any]:
    import importlib.util
    import os
    import platform

    import torch

    from mixbits import __version__
    from mixbits.kernels import cpu
    from mixbits.lm.precision import resolve_precision

    facts: dict[str, Any] = {
        "mixbits": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
        "kernels": cpu.why_unavailable(),
    }
    if cpu.is_available():
        facts |= {"instruction_set": cpu.isa(), "usable": cpu.isas(), "threads": cpu.num_threads()}
    else:
        facts["kernels"] = f"missing, PyTorch is used, slower: {cpu.why_unavailable()}; install with a C++ compiler"
    facts["training_precision"] = resolve_precision("auto", "cpu")
    facts["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none that PyTorch sees"
    wanted = {"triton": "GPU kernels", "kenlm": "fast n-gram models", "pocketsphinx": "the demo's recognizer"}
    for package, use in wanted.items():
        found = importlib.util.find_spec(package) is not None
        facts[package] = "installed" if found else f"not installed ({use})"
    facts["MIXBITS_DATA"] = os.environ.get("MIXBITS_DATA", "not set (real corpora for tests and recipes)")
    return facts
