"""Reading and writing ordinary Hugging Face model directories, local ones only."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixbits.errors import DataError, FormatError
from mixbits.lm.tokenizer import load_tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers shows neither progress bars nor warnings of its own."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def load_model(path: str | Path, *, dtype: Any = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) from a directory; float32 unless ``dtype`` says otherwise.

    Raises DataError when it is no model directory, FormatError when it cannot be read or its vocabulary is smaller than
    the tokenizer's.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise DataError(
            f"{path}: no config.json; expected a Hugging Face model directory (mixbits train or compress makes one)"
        )
    tokenizer = load_tokenizer(path)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: model cannot be loaded ({str(error).strip().splitlines()[0]})") from None
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
    with quiet_transformers():
        model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def model_hash(path: str | Path) -> str:
    """SHA-256 over the weight files of a model directory, in name order."""
    digest = hashlib.sha256()
    files = sorted(Path(path).glob("*.safetensors")) or sorted(Path(path).glob("*.bin"))
    if not files:
        raise DataError(f"{path}: no weight files (*.safetensors) to hash")
    for file in files:
        with open(file, "rb") as handle:
            digest.update(
                hashlib.file_digest(handle, "sha256").digest() if hasattr(hashlib, "file_digest") else handle.read()
            )
    return digest.hexdigest()
