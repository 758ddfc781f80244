"""``manifest.json``: what went into a run and what came out of it, as hashes. Two runs with one seed have the same manifest.

In: seed, data, models (the full one and every row), measures with the hash of their sensitivities, the solver's input per
allocation, settings, versions. Out: a hash of every file of the run folder.

Why not plain file hashes throughout: some JSON files also say how long something took, by which command, and on what machine.
Those keys (:data:`NOT_COMPARED`, at any depth) are left out before such a file is hashed, and its entry says so; every other file is
hashed byte for byte. Left out altogether: ``train`` folders and temporary files (gone when a run is finished), and ``scores``, a cache.

Limits: bit-identical on one machine with one number of threads; floating-point sums differ between machines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixbits.errors import DataError, FormatError
from mixbits.jsonfile import plain, read_json, write_json
from mixbits.lm.checkpoint import model_hash
from mixbits.quant.sensitivity import Sensitivities
from mixbits.runs import hash_file, hash_text, versions
from mixbits.spec import BitAllocation

MANIFEST_FILE = "manifest.json"
FORMAT, FORMAT_VERSION = "mixbits-manifest", 1
NOT_COMPARED = ("command", "seconds", "versions")
"""Keys of JSON files that differ between equal runs; so do those that end as in :data:`NOT_COMPARED_ENDINGS`."""
NOT_COMPARED_ENDINGS = ("_seconds", "_runtime", "_per_second")
"""Ours, and those of transformers' training log."""
_SKIPPED_FOLDERS = ("train", "scores")
_SKIPPED_ENDINGS = (".tmp", ".partial", ".partial.npz")


@dataclass(frozen=True)
class Difference:
    """A file that is not as the manifest says."""

    path: str
    problem: Literal["changed", "missing", "not in the manifest"]

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def write_manifest(
    folder: str | Path,
    *,
    seed: int,
    settings: Any,
    data: Mapping[str, str],
    models: Mapping[str, str | Path],
    sensitivities: Iterable[Sensitivities] = (),
    allocations: Mapping[str, BitAllocation] | None = None,
) -> Path:
    """Hash a finished run into ``folder/manifest.json``; returns its path. Replaces the manifest that was there.

    Args:
        settings: plain data or a pydantic model; only its hash is kept, without the paths of texts and lists in it (``text``, ``speech``:
            their content is in ``data``), so that moved data do not make another run.
        data: name → sha256 of texts and lists. models: name → model directory; ``full`` is the full-precision one.
        sensitivities: what was measured. allocations: row → bits; ``solver_input_sha256`` comes from their provenance.

    Raises:
        DataError: ``folder`` or a model is missing or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a manifest is written into the folder of a finished run")
    chosen = settings.model_dump(mode="json") if hasattr(settings, "model_dump") else settings
    if isinstance(chosen, Mapping):
        chosen = {key: value for key, value in chosen.items() if key not in ("text", "speech")}
    bits = sorted((allocations or {}).items())
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "data": dict(sorted(data.items())),
        "models": {name: model_hash(path) for name, path in sorted(models.items())},
        "measures": sorted(
            ({"measure": s.measure, "sha256": content_hash(s.to_json())} for s in sensitivities),
            key=lambda entry: (entry["measure"], entry["sha256"]),
        ),
        "solver_inputs": {
            name: {"solver_input_sha256": a.provenance.get("solver_input_sha256"), "specs_sha256": content_hash(a.to_json()["specs"])}
            for name, a in bits
        },
        "settings_sha256": content_hash(chosen),
        "versions": versions(),
        "files": {name: _file_entry(folder / name) for name in _file_names(folder)},
    }  # fmt: skip
    return write_json(folder / MANIFEST_FILE, record)


def verify_manifest(folder: str | Path) -> list[Difference]:
    """Hash the files of a run again: those that changed, are missing, or came later, in order of their names.

    Raises DataError when there is no manifest, FormatError when it is not one.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FormatError(f"{path}: not a manifest; expected a JSON object with format {FORMAT!r}")
    if manifest.get("format_version") != FORMAT_VERSION or not isinstance(manifest.get("files"), dict):
        version = manifest.get("format_version")
        raise FormatError(
            f"{path}: format version {version!r} or its files cannot be read; this mixbits reads {FORMAT_VERSION}"
        )
    kept, found = manifest["files"], set(_file_names(folder))
    differences = []
    for name in sorted(found | set(kept)):
        if name not in found:
            differences.append(Difference(name, "missing"))
        elif name not in kept:
            differences.append(Difference(name, "not in the manifest"))
        elif _file_entry(folder / name) != kept[name]:
            differences.append(Difference(name, "changed"))
    return differences


def content_hash(data: Any) -> str:
    """sha256 of plain data without the keys of :data:`NOT_COMPARED`; the order of keys does not matter."""
    return hash_text(json.dumps(_comparable(plain(data)), sort_keys=True, ensure_ascii=False))


def _not_compared(key: str) -> bool:
    return key in NOT_COMPARED or key.endswith(NOT_COMPARED_ENDINGS)


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items() if not _not_compared(key)}
    return [_comparable(item) for item in value] if isinstance(value, list) else value


def _left_out(value: Any) -> set[str]:
    """The keys that :func:`_comparable` takes away."""
    if isinstance(value, list):
        return set().union(*map(_left_out, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    here = {key for key in value if _not_compared(key)}
    return here.union(*(_left_out(item) for key, item in value.items() if key not in here))


def _file_entry(path: Path) -> dict[str, Any]:
    """Hash of a file; of a JSON file with keys that are not compared, hash of the rest, and those keys."""
    if path.suffix == ".json":
        try:
            data = read_json(path)
        except (DataError, FormatError):
            return {"sha256": hash_file(path)}
        without = sorted(_left_out(data))
        if without:
            return {"content_sha256": content_hash(data), "without": without}
    return {"sha256": hash_file(path)}


def _file_names(folder: Path) -> list[str]:
    """Paths of the run's files relative to ``folder``, with ``/``, sorted."""
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or name.endswith(_SKIPPED_ENDINGS) or path == folder / MANIFEST_FILE:
                continue
            yield path.relative_to(folder).as_posix()
