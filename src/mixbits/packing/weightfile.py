"""One weight file: a safetensors file whose header is the one `spec.py` computes; a bounded reader and a synced writer.

Why our own reader: this is where hostile input arrives, and an error has to name the file, the tensor and the field. The
reader allocates nothing in proportion to what a header claims, only to what the file really holds, and reads tensors from a
memory map. Files written here are ordinary safetensors files; several can make a model (:mod:`mixbits.packing.weightset`).
Limits: dtypes U8 and F16, header at most 64 MB, little-endian machines.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from mixbits.errors import DataError, FormatError
from mixbits.spec import FORMAT_VERSION, StoredTensor, safetensors_header

WEIGHTS_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 64 << 20
_MAX_DIMS = 8
_TORCH_DTYPES = {"U8": torch.uint8, "F16": torch.float16}
_NUMPY_DTYPES = {"U8": "u1", "F16": "<f2"}


@dataclass(frozen=True)
class WeightFile:
    """A parsed header: the tensors in file order, where each begins (bytes from the start of the file), the file's size.

    ``content``: the file's bytes where they do not stand on the disk as such (unpacked from an archive), else None.
    """

    path: Path
    tensors: tuple[StoredTensor, ...]
    offsets: Mapping[str, int]
    file_bytes: int
    content: npt.NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)

    @property
    def by_name(self) -> dict[str, StoredTensor]:
        """Tensor name -> entry."""
        return {t.name: t for t in self.tensors}

    def reader(self) -> TensorReader:
        """Memory-map the file for reading tensors. Raises FormatError if it changed size since it was parsed."""
        return TensorReader([self])

    def mapped(self) -> npt.NDArray[np.uint8]:
        """All bytes of the file, read-only, mapped for as long as something refers to them. Raises FormatError as above."""
        if self.content is not None:
            return self.content
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size != self.file_bytes:
                    raise FormatError(f"{self.path}: its size changed while it was read; load it again")
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None


class TensorReader:
    """Tensors of one or more weight files, mapped for as long as the reader or what it gave out is there."""

    def __init__(self, files: Sequence[WeightFile]) -> None:
        self._places: dict[str, tuple[npt.NDArray[np.uint8], int]] = {}
        for file in files:
            content = file.mapped()
            self._places |= {t.name: (content, file.offsets[t.name]) for t in file.tensors}

    def raw(self, stored: StoredTensor) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor where they stand in the mapped file, 1-D, read-only. They keep the file mapped."""
        content, start = self._places[stored.name]
        return content[start : start + stored.num_bytes]

    def array(self, stored: StoredTensor) -> npt.NDArray[Any]:
        """The same as uint8 or float16 numbers in the tensor's shape: nothing is copied."""
        return self.raw(stored).view(_NUMPY_DTYPES[stored.dtype]).reshape(stored.shape)

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """A copy of one tensor, so that it outlives the map."""
        return torch.from_numpy(self.array(stored).copy())


def read_weight_file(path: str | Path) -> WeightFile:
    """Parse and check the header against the file. Raises DataError (missing) or FormatError naming file, tensor, field."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            text = file.read(_header_length(path, file.read(8), size))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; a packed model keeps its weights there") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return _parse_header(path, text, size)


def parse_weight_file(path: Path, content: npt.NDArray[np.uint8]) -> WeightFile:
    """The same for a file whose bytes are in memory; ``path`` names it in errors."""
    length = _header_length(path, content[:8].tobytes(), len(content))
    return _parse_header(path, content[8 : 8 + length].tobytes(), len(content), content)


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or size < 8:
        raise FormatError(f"{path}: only {size} bytes; a weight file starts with an 8-byte header length: cut short?")
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise FormatError(
            f"{path}: header length says {length} bytes, but the file has {size} and a header at most "
            f"{_MAX_HEADER_BYTES}: cut short or damaged"
        )
    return length


def _parse_header(path: Path, text: bytes, size: int, content: npt.NDArray[np.uint8] | None = None) -> WeightFile:
    entries = _parse_json(path, text)
    _check_metadata(path, entries.pop("__metadata__", None))
    spans = [_entry(path, name, value) for name, value in entries.items()]
    spans.sort(key=lambda span: span[1:])
    position = 0
    for stored, begin, end in spans:
        if begin != position:
            raise FormatError(
                f"{path}: tensor {stored.name[:200]!r}: data_offsets begin at {begin}; expected {position} (no gap, no overlap)"
            )
        position = end
    data_start = 8 + len(text)
    if position != size - data_start:
        cut = "cut short" if position > size - data_start else "has bytes after the last tensor"
        raise FormatError(
            f"{path}: {cut}: the header promises {position} bytes of tensors, the file holds {size - data_start}; copy it again"
        )
    offsets = {stored.name: data_start + begin for stored, begin, _ in spans}
    return WeightFile(path, tuple(stored for stored, _, _ in spans), offsets, size, content)


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


def stored_bytes(entry: StoredTensor, tensor: torch.Tensor) -> memoryview:
    """The bytes of ``tensor`` (any device) as they are stored. Its dtype and shape must be those of ``entry``: asserted."""
    tensor = tensor.detach().cpu().contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (_TORCH_DTYPES[entry.dtype], entry.shape), entry
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def checksum(data: memoryview) -> str:
    """CRC-32 (that of zlib, gzip, PNG) of a tensor's bytes: eight hexadecimal digits, lower case."""
    return f"{zlib.crc32(data):08x}"


def write_weight_file(path: str | Path, stored: Sequence[StoredTensor], tensors: Mapping[str, torch.Tensor]) -> int:
    """Write ``tensors`` in the order of ``stored`` under a temporary name, sync, rename, sync the folder. Returns the file's
    bytes.

    Each tensor must have the stored dtype and shape (any device); that is an invariant of the callers, asserted.
    """
    with replacing(path) as file:
        file.write(safetensors_header(stored))
        for entry in stored:
            file.write(stored_bytes(entry, tensors[entry.name]))
    return Path(path).stat().st_size


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name ``path`` once it is whole and on the disk; nothing is left of it on an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
