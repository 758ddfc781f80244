"""What a run was made with: file hashes, versions, machine; and, in one place, the JSON files a run folder holds.

What: :func:`hash_file` and friends (sha256 in hex), :func:`versions`, and, from their own modules, ``read_json``,
``write_json`` (:mod:`mixbits.jsonfile`) and ``Summary`` with its readers and writers (:mod:`mixbits.summary`).

Limits: hashes are of the bytes on disk (a recompressed ``.gz`` hashes differently). Nothing heavy is imported here;
package versions come from the installed metadata.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mixbits.errors import DataError
from mixbits.jsonfile import read_json, write_json, write_text
from mixbits.summary import Summary, SummaryRow, read_summary, write_summary

__all__ = [
    "Summary",
    "SummaryRow",
    "hash_file",
    "hash_files",
    "hash_text",
    "read_json",
    "read_summary",
    "versions",
    "write_json",
    "write_summary",
    "write_text",
]

_PACKAGES = (
    *("mixbits", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "scipy"),
    *("kaldialign", "pocketsphinx", "espeakng-loader"),
)


def hash_text(text: str) -> str:
    """sha256 of the text's UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def hash_file(path: str | Path) -> str:
    """sha256 of the file's bytes, in hex. Raises DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return digest.hexdigest()


def hash_files(paths: Iterable[str | Path] | Mapping[str, str | Path]) -> dict[str, str]:
    """sha256 of each file, by the mapping's own names, or by file name (with its folder's where two files share one)."""
    if isinstance(paths, Mapping):
        return {name: hash_file(path) for name, path in paths.items()}
    files = [Path(path) for path in paths]
    names = [path.name for path in files]
    return {(p.name if names.count(p.name) == 1 else f"{p.parent.name}/{p.name}"): hash_file(p) for p in files}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the repository this very file is tracked in ("-dirty" if changed); None for an installed wheel."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, Any]:
    """What this process runs on: package versions (null if absent), git commit, Python, platform, CPU, cores, threads."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _git_commit()
    found["platform"] = platform.platform()
    found["cpu"] = _cpu_model()
    affinity = getattr(os, "sched_getaffinity", None)
    found["num_cores"] = len(affinity(0)) if affinity else os.cpu_count()
    torch = sys.modules.get("torch")
    environment = os.environ.get("OMP_NUM_THREADS", "")
    known = torch.get_num_threads() if torch is not None and hasattr(torch, "get_num_threads") else None
    found["num_threads"] = known or (int(environment) if environment.isdecimal() else found["num_cores"])
    return found
