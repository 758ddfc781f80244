"""Reading and writing ordinary Hugging Face model directories, local ones only."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixbits.errors import DataError, FormatError, MixbitsError
from mixbits.lm.tokenizer import load_tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers shows neither progress bars nor warnings of its own."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def load_model(path: str | Path, *, dtype: Any = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a directory; float32 unless ``dtype`` says otherwise.

    Raises DataError when it is no model directory, FormatError when it cannot be read, a weight is missing (transformers
    would go on with random values) or its vocabulary is smaller than the tokenizer's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    path = Path(path)
    if not (path / "config.json").is_file():
        raise DataError(
            f"{path}: no config.json; expected a Hugging Face model directory (mixbits train or compress makes one)"
        )
    tokenizer = load_tokenizer(path)
    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(
                path,
                dtype=dtype or torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except MixbitsError:
        raise
    except Exception as error:  # a broken file can raise anything, from the json module to safetensors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FormatError(f"{path}: model cannot be loaded ({reason})") from None
    if info["missing_keys"]:
        missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        raise FormatError(
            f"{path}: {len(missing)} weights are missing, e.g. {missing[0]!r}"
            + (f", and {extra[0]!r} is not part of the model" if extra else "")
            + "; the weight file does not belong to config.json"
        )
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise FormatError(
            f"{path}: tokenizer has {len(tokenizer)} entries, the model only {size}; they do not belong together"
        )
    return model.eval(), tokenizer


def save_model(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Write a model directory under a temporary name, then rename it. Replaces what was there."""
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_transformers():
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def model_hash(path: str | Path) -> str:
    """SHA-256 over the weight files of a model directory, in name order; archived ones (``.gz``) count as what they unpack to.

    Raises DataError without weight files, FormatError for a damaged archive.
    """
    folder, digest = Path(path), hashlib.sha256()
    found = {file.name.removesuffix(".gz"): file for file in folder.glob("*.safetensors.gz")}
    found |= {file.name: file for file in folder.glob("*.safetensors")}
    found = found or {file.name: file for file in folder.glob("*.bin")}
    if not found:
        raise DataError(f"{path}: no weight files (*.safetensors) to hash")
    for _, file in sorted(found.items()):
        part = hashlib.sha256()
        try:
            with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as handle:
                while block := handle.read(1 << 20):
                    part.update(block)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise FormatError(f"{file}: damaged archive: {error}; copy it again") from None
        digest.update(part.digest())
    return digest.hexdigest()
