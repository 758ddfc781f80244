"""Archives: weight files compressed without loss, for keeping and sending; the codec is gzip.

What: ``model.safetensors`` becomes ``model.safetensors.gz``, which ``gunzip`` unpacks to the very same bytes, where that saves
at least 3 % of the file; ``quantization_config.archive`` says so, so that ``from_pretrained``, which cannot read it, says what to do.
Everything else reads archives as they are: the engine and ``inspect`` in memory, PyTorch models from a temporary folder (:func:`unarchived`).

Why gzip: Huffman codes of whole bytes are what the codes of trained weights need, 3 to 12 % on the models measured (docs/formats/packed.md);
lzma finds 0.5 % more and unpacks eleven times slower (57 ns a byte to 5). It is in the standard library, and everybody has the tool.

Hostile input: an archive is unpacked as it is read, never to more than 64 times its own size (archives that would be are not
written), and nothing is believed before its own check sum.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mixbits.errors import DataError, FormatError
from mixbits.jsonfile import write_text
from mixbits.packing.config import read_config
from mixbits.packing.weightfile import replacing, sync_folder

ARCHIVE_SUFFIX = ".gz"
ARCHIVE_METHOD = "gzip"
MIN_GAIN = 0.03
"""Share of a file's bytes that an archive has to save."""
MAX_EXPANSION = 64
"""An archive holds at most so many times its own bytes."""
_GZIP = 31  # zlib's window bits for a gzip stream
_BLOCK_BYTES = 1 << 20


def archive_packed(directory: str | Path) -> int:
    """Archive the weight files of a model folder, in place. Returns the bytes of all weight files afterwards (:func:`disk_bytes`).

    A file whose archive saves less than 3 % stays as it is. Raises DataError or FormatError (no weights, no packed model).
    """
    directory = Path(directory)
    plain = sorted(directory.glob("*.safetensors"))
    if not plain and not sorted(directory.glob("*.safetensors" + ARCHIVE_SUFFIX)):
        raise DataError(
            f"{directory}: no weight files (*.safetensors) to archive; expected the folder of a packed model"
        )
    read_config(directory)  # found out before the work: is it a packed model at all?
    made = [archive_file(path) for path in plain]
    found = sorted(directory.glob("*.safetensors" + ARCHIVE_SUFFIX))
    if found:
        _set_archive_field(directory, ARCHIVE_METHOD)
    for path in (path for path, archive in zip(plain, made, strict=True) if archive is not None):
        path.unlink()
    sync_folder(directory)
    return disk_bytes(directory)


def disk_bytes(directory: str | Path) -> int:
    """Bytes of the weight files of a model folder as the file system counts them, archived or not."""
    patterns = ("*.safetensors", "*.safetensors" + ARCHIVE_SUFFIX)
    return sum(path.stat().st_size for pattern in patterns for path in Path(directory).glob(pattern))


def is_archived(directory: str | Path) -> bool:
    """Whether weight files of a model folder are archived, or config.json says so though another program unpacked them."""
    archives = Path(directory).glob("*.safetensors" + ARCHIVE_SUFFIX)
    if any(not path.with_suffix("").exists() for path in archives):
        return True
    try:
        return "archive" in read_config(directory)["quantization_config"]
    except (DataError, FormatError):  # no packed model
        return False


@contextmanager
def unarchived(directory: str | Path) -> Iterator[Path]:
    """Within it, the folder of a model as it is, or, of an archived one, a temporary one with its files unpacked.

    Tensors mapped from the temporary files stay when these are removed. Raises FormatError or DataError as :func:`unarchive_packed`.
    """
    directory = Path(directory)
    if not is_archived(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="mixbits-", ignore_cleanup_errors=True) as folder:
        yield unarchive_packed(directory, Path(folder) / "model")


def unarchive_packed(directory: str | Path, output: str | Path | None = None) -> Path:
    """Unpack the weight files of a model folder, in place, or into the new folder ``output`` beside copies of all other files.

    The result is what was archived, file by file and byte by byte. Returns its folder. Raises DataError (nothing to unpack,
    ``output`` in use) or FormatError (damaged).
    """
    directory = Path(directory)
    archives = sorted(directory.glob("*.safetensors" + ARCHIVE_SUFFIX))
    is_unpacked = "archive" in read_config(directory)["quantization_config"] and any(directory.glob("*.safetensors"))
    if not archives and not is_unpacked:  # another program may have unpacked them
        raise DataError(f"{directory}: no archived weight files (*.safetensors{ARCHIVE_SUFFIX}) in it")
    target = directory if output is None else Path(output)
    if target != directory:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DataError(f"{target}: is there already; choose the name of a new folder")
        shutil.copytree(directory, target, ignore=lambda *_: [path.name for path in archives], dirs_exist_ok=True)
    for path in archives:
        with replacing(target / path.name.removesuffix(ARCHIVE_SUFFIX)) as out:
            for block in unpacked_blocks(path):
                out.write(block)
    _set_archive_field(target, None)
    if target == directory:
        for path in archives:
            path.unlink()
        sync_folder(directory)
    return target


def _set_archive_field(directory: Path, method: str | None) -> None:
    """Set or remove ``quantization_config.archive``; everything else stays as transformers writes it."""
    config = read_config(directory)
    found = config["quantization_config"]
    if found.get("archive") == method:
        return
    found.pop("archive", None)
    if method is not None:
        found["archive"] = method
    write_text(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def archive_file(path: Path) -> Path | None:
    """Write the archive of ``path`` beside it and return it; None, and nothing is there, if that saves too little.

    The archive is unpacked again and compared; ``path`` itself stays.
    """
    size, target = path.stat().st_size, path.with_name(path.name + ARCHIVE_SUFFIX)
    packer = zlib.compressobj(9, zlib.DEFLATED, _GZIP)
    with replacing(target) as out, open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            out.write(packer.compress(block))
        out.write(packer.flush())
    smaller = target.stat().st_size
    if smaller > (1 - MIN_GAIN) * size or smaller * MAX_EXPANSION < size:
        target.unlink()
        return None
    with open(path, "rb") as file:
        for block in unpacked_blocks(target):
            if file.read(len(block)) != block:
                raise DataError(f"{target}: does not unpack to what was put in; check the disk, and archive again")
    return target


def unpacked(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of an archive. Raises FormatError (damaged, cut short, more than it may hold) or DataError (unreadable)."""
    content = bytearray()
    for block in unpacked_blocks(path):
        content += block
    array = np.frombuffer(content, dtype=np.uint8)
    array.flags.writeable = False
    return array


def unpacked_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of an archive a piece at a time; FormatError as soon as something is wrong."""
    unpacker, total = zlib.decompressobj(_GZIP), 0
    try:
        with open(path, "rb") as file:
            allowed = MAX_EXPANSION * os.fstat(file.fileno()).st_size
            while not unpacker.eof:
                block = unpacker.unconsumed_tail or file.read(_BLOCK_BYTES)
                piece = unpacker.decompress(block, _BLOCK_BYTES)
                if not block and not piece:
                    raise FormatError(f"{path}: cut short: the archive ends before its end mark; copy it again")
                total += len(piece)
                if total > allowed:
                    raise FormatError(
                        f"{path}: unpacks to more than {MAX_EXPANSION} times its size: damaged, or made to do harm"
                    )
                yield piece
            if unpacker.unused_data or file.read(1):
                raise FormatError(f"{path}: has bytes after the end of the archive: damaged; copy it again")
    except zlib.error as error:
        raise FormatError(f"{path}: damaged archive: {error}; copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
