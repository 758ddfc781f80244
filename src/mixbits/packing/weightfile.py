"""The weight file: a safetensors file whose header is the one `spec.py` computes; a bounded reader and a synced writer.

Why our own reader: this is where hostile input arrives, and an error has to name the file, the tensor and the field. The
reader allocates nothing in proportion to what a header claims, only to what the file really holds. Files written here are
ordinary safetensors files. Limits: one file (no shards), dtypes U8 and F16, header at most 64 MB.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import DataError, FormatError
from mixbits.spec import FORMAT_VERSION, StoredTensor, safetensors_header

WEIGHTS_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 64 << 20
_MAX_DIMS = 8
_TORCH_DTYPES = {"U8": torch.uint8, "F16": torch.float16}


@dataclass(frozen=True)
class WeightFile:
    """A parsed header: the tensors in file order, where each begins (bytes from the start of the file), the file's size."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    offsets: Mapping[str, int]
    file_bytes: int

    @property
    def by_name(self) -> dict[str, StoredTensor]:
        """Tensor name -> entry."""
        return {t.name: t for t in self.tensors}

    @contextmanager
    def open(self) -> Iterator[_Reader]:
        """Memory-map the file for reading tensors. Raises FormatError if it changed size since it was parsed."""
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self.file_bytes:
                raise FormatError(f"{self.path}: its size changed while it was read; load it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield _Reader(self, mapped)


class _Reader:
    def __init__(self, weight_file: WeightFile, mapped: mmap.mmap) -> None:
        self._file, self._mapped = weight_file, mapped

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """A copy of one tensor, so that it outlives the map."""
        start = self._file.offsets[stored.name]
        with memoryview(self._mapped) as view:
            raw = bytearray(view[start : start + stored.num_bytes])
        if not raw:
            return torch.empty(stored.shape, dtype=_TORCH_DTYPES[stored.dtype])
        return torch.frombuffer(raw, dtype=_TORCH_DTYPES[stored.dtype]).view(stored.shape)


def read_weight_file(path: str | Path) -> WeightFile:
    """Parse and check the header against the file. Raises DataError (missing) or FormatError naming file, tensor, field."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or size < 8:
                raise FormatError(
                    f"{path}: only {size} bytes; a weight file starts with an 8-byte header length: cut short?"
                )
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise FormatError(
                    f"{path}: header length says {length} bytes, but the file has {size} and a header at most "
                    f"{_MAX_HEADER_BYTES}: cut short or damaged"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a packed model keeps its weights there") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    entries = _parse_json(path, text)
    _check_metadata(path, entries.pop("__metadata__", None))
    spans = [_entry(path, name, value) for name, value in entries.items()]
    spans.sort(key=lambda span: span[1:])
    position = 0
    for stored, begin, end in spans:
        if begin != position:
            raise FormatError(
                f"{path}: tensor {stored.name!r}: data_offsets begin at {begin}; expected {position} (no gap, no overlap)"
            )
        position = end
    data_start = 8 + length
    if position != size - data_start:
        cut = "cut short" if position > size - data_start else "has bytes after the last tensor"
        raise FormatError(
            f"{path}: {cut}: the header promises {position} bytes of tensors, the file holds {size - data_start}; copy it again"
        )
    return WeightFile(path, tuple(s for s, _, _ in spans), {s.name: data_start + b for s, b, _ in spans}, size)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:100]!r} stands there twice")
        found[key] = value
    return found


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise FormatError(f"{path}: damaged header: not readable as JSON ({reason})") from None
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: damaged header: a JSON {type(entries).__name__}, expected an object of tensors")
    return entries


def _check_metadata(path: Path, metadata: Any) -> None:
    metadata = metadata if isinstance(metadata, dict) else {}
    if metadata.get("format") != "mixbits":
        raise FormatError(
            f"{path}: header field __metadata__.format is {metadata.get('format')!r:.100}; expected 'mixbits': "
            "not a weight file packed by mixbits"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise FormatError(
            f"{path}: header field __metadata__.format_version is {metadata.get('format_version')!r:.100}; this mixbits reads "
            f"'{FORMAT_VERSION}'. Pack the model again or use the mixbits that wrote it"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _entry(path: Path, name: str, value: Any) -> tuple[StoredTensor, int, int]:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in ("U8", "F16"):
        raise FormatError(f"{where}: dtype is {dtype!r:.100}; expected 'U8' (codes) or 'F16'")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_count, shape)):
        raise FormatError(f"{where}: shape is {shape!r:.100}; expected at most {_MAX_DIMS} sizes, none negative")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise FormatError(f"{where}: data_offsets are {offsets!r:.100}; expected two numbers of bytes")
    stored = StoredTensor(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != stored.num_bytes:
        raise FormatError(
            f"{where}: data_offsets span {offsets[1] - offsets[0]} bytes, but shape {tuple(shape)!s:.100} of {dtype} takes "
            f"{stored.num_bytes}"
        )
    return stored, offsets[0], offsets[1]


def write_weight_file(path: str | Path, stored: Sequence[StoredTensor], tensors: Mapping[str, torch.Tensor]) -> int:
    """Write ``tensors`` in the order of ``stored`` under a temporary name, sync, rename. Returns the file's bytes.

    Each tensor must have the stored dtype and shape (any device); that is an invariant of the callers, asserted.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(safetensors_header(stored))
            for entry in stored:
                tensor = tensors[entry.name].detach().cpu().contiguous()
                assert (tensor.dtype, tuple(tensor.shape)) == (_TORCH_DTYPES[entry.dtype], entry.shape), entry
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path.stat().st_size
