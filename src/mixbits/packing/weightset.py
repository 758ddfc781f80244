"""All weight files of a packed model: one, or several shards with an index, as transformers names and reads them.

``model.safetensors``, or ``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json``, whose ``weight_map`` says
which tensor stands in which file. Tensors keep their order; a file begins where the one before reached the limit. Each of the
files may have been archived (:mod:`mixbits.packing.archive`) and is then unpacked in memory.

Limits: all files in one folder; ``max_shard_bytes`` counts data, not headers, as transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import DataError, FormatError
from mixbits.jsonfile import read_json, write_json
from mixbits.packing.archive import ARCHIVE_SUFFIX, unpacked
from mixbits.packing.weightfile import (
    WEIGHTS_NAME,
    TensorReader,
    WeightFile,
    checksum,
    parse_weight_file,
    read_weight_file,
    stored_bytes,
    write_weight_file,
)
from mixbits.spec import MAX_SHARD_BYTES, StoredTensor, shards

INDEX_NAME = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_OWN_NAME = re.compile(r"(model|model-[0-9]{5}-of-[0-9]{5})\.safetensors(\.gz|\.index\.json)?")


@dataclass(frozen=True)
class WeightSet:
    """The parsed headers of all weight files of a model; no name stands in two of them."""

    files: tuple[WeightFile, ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """All tensors in file order."""
        return tuple(t for file in self.files for t in file.tensors)

    @cached_property
    def by_name(self) -> dict[str, StoredTensor]:
        """Tensor name -> entry."""
        return {t.name: t for t in self.tensors}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Tensor name -> the file it stands in."""
        return {t.name: file.path for file in self.files for t in file.tensors}

    @property
    def path(self) -> Path:
        """The file to name when a tensor is missing: the only one, or the index."""
        first = self.files[0].path
        return first if len(self.files) == 1 else first.with_name(INDEX_NAME)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files, unpacked if they are archived."""
        return sum(file.file_bytes for file in self.files)

    def reader(self) -> TensorReader:
        """Memory-map all files for reading tensors. Raises FormatError if one changed size since it was parsed."""
        return TensorReader(self.files)


def read_weight_files(paths: Sequence[str | Path]) -> WeightSet:
    """Parse the headers of these files. Raises DataError or FormatError as ``read_weight_file``, and for a name in two files."""
    return _weight_set([read_weight_file(path) for path in paths])


def _weight_set(files: Sequence[WeightFile]) -> WeightSet:
    seen: dict[str, Path] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in seen:
                raise FormatError(f"{file.path}: tensor {tensor.name[:200]!r} stands in {seen[tensor.name].name}, too")
            seen[tensor.name] = file.path
    return WeightSet(tuple(files))


def weight_paths(directory: str | Path) -> list[Path]:
    """The weight files of a model folder in order, under the names they have unpacked.

    Raises DataError (no weights, a shard is missing) or FormatError (the index).
    """
    directory = Path(directory)
    single = directory / WEIGHTS_NAME
    if single.exists() or archived(single).exists():
        return [single]
    index = directory / INDEX_NAME
    if not index.exists():
        raise DataError(f"{single}: no such file; a packed model keeps its weights there")
    return [directory / name for name in sorted(set(_read_index(index).values()))]


def read_weights(directory: str | Path) -> WeightSet:
    """Parse the headers of all weight files of a model folder and its index; archived files are unpacked in memory.

    Raises DataError (missing) or FormatError naming file, tensor and field.
    """
    paths = weight_paths(directory)
    weights = _weight_set([_read(path) for path in paths])
    index = Path(directory) / INDEX_NAME
    if paths[0].name != WEIGHTS_NAME:
        _check_index(index, _read_index(index), weights)
    return weights


def archived(path: Path) -> Path:
    """The name of a weight file's archive."""
    return path.with_name(path.name + ARCHIVE_SUFFIX)


def _read(path: Path) -> WeightFile:
    if not path.exists() and archived(path).exists():
        return parse_weight_file(archived(path), unpacked(archived(path)))
    return read_weight_file(path)


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{path}: weight_map is missing or not an object of tensor name -> file")
    for name, file in found.items():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise FormatError(
                f"{path}: weight_map[{name[:200]!r}] is {file!r:.100}; expected e.g. 'model-00001-of-00002.safetensors'"
            )
    return found


def _check_index(path: Path, weight_map: Mapping[str, str], weights: WeightSet) -> None:
    for name, file in weight_map.items():
        found = weights.paths.get(name)
        if found is None or found.name.removesuffix(ARCHIVE_SUFFIX) != file:
            where = "in no file" if found is None else f"in {found.name}"
            raise FormatError(f"{path}: weight_map says that tensor {name[:200]!r} stands in {file}; it is {where}")
    extra = sorted(set(weights.paths) - set(weight_map))
    if extra:
        raise FormatError(f"{weights.paths[extra[0]]}: tensor {extra[0][:200]!r} is missing in {path.name}")


@dataclass(frozen=True)
class WrittenWeights:
    """Bytes of all weight files, and the checksum of each tensor by name."""

    file_bytes: int
    checksums: dict[str, str]


def write_weights(
    directory: Path,
    stored: Sequence[StoredTensor],
    tensors: Mapping[str, torch.Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> WrittenWeights:
    """Write the weight files of a model and, for more than one, their index; then remove weight files of another split.

    ``tensors`` as for ``write_weight_file``. Raises SpecError for a limit below one byte.
    """
    parts = shards(stored, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = [WEIGHTS_NAME]
    sums = {entry.name: checksum(stored_bytes(entry, tensors[entry.name])) for entry in stored}
    total = sum(write_weight_file(directory / name, part, tensors) for name, part in zip(names, parts, strict=True))
    keep = set(names)
    if len(parts) > 1:
        weight_map = {entry.name: name for name, part in zip(names, parts, strict=True) for entry in part}
        data: dict[str, Any] = {"metadata": {"total_size": sum(t.num_bytes for t in stored)}, "weight_map": weight_map}
        write_json(directory / INDEX_NAME, data)
        keep.add(INDEX_NAME)
    for path in directory.iterdir():
        if _OWN_NAME.fullmatch(path.name) and path.name not in keep:
            path.unlink()
    return WrittenWeights(total, sums)
