"""Checks that stop a job before it has cost anything: broken models, text that does not fit the model, folders in use.

Each raises one clear error; what is merely suspicious is logged as a warning.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixbits.errors import DataError
from mixbits.lm.corpus import TokenStream

_logger = logging.getLogger(__name__)
_TOO_MANY_UNKNOWN, _MANY_UNKNOWN = 0.5, 0.2
_LEARNED_NATS = 0.02


def check_full_precision(model: Any, where: str | Path) -> None:
    """Raise DataError unless ``model`` is an ordinary one with finite weights."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise DataError(f"{where}: is quantized already; expected a full-precision model directory")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where}: {name} has NaN or infinite values; repair or retrain the model first")


def check_text(stream: TokenStream, context: int, where: str | Path) -> None:
    """Raise DataError when a text is shorter than one block, or when more than half of its words are unknown.

    More than a fifth of unknown words is logged as a warning.
    """
    if stream.num_tokens < context:
        raise DataError(
            f"{where}: {stream.num_tokens} tokens are less than one block of {context}; give more text (every 20th sentence is "
            "held out for validation unless a validation text is given)"
        )
    share = stream.num_unknown / max(1, stream.num_words)
    if share > _TOO_MANY_UNKNOWN:
        raise DataError(
            f"{where}: {100 * share:.0f} % of its words are unknown to the model's tokenizer; the text does not fit the model "
            "(another language, upper or lower case, tokenized otherwise?)"
        )
    if share > _MANY_UNKNOWN:
        _logger.warning("%s: %.0f %% of its words are unknown to the model's tokenizer", where, 100 * share)


def check_learned(valid_nats: float, train: TokenStream, valid: TokenStream, where: str | Path) -> None:
    """Log a warning when a trained model's validation loss (nats a token) is no better than that of word frequencies.

    Frequencies: those of the training tokens, each counted once more than it occurs.
    """
    num_types = 1 + int(max(train.ids.max(), valid.ids.max()))
    counts = np.bincount(train.ids[1:], minlength=num_types) + 1
    frequencies_nats = -float(np.log(counts / counts.sum())[valid.ids[1:]].mean())
    if valid_nats > frequencies_nats - _LEARNED_NATS:
        _logger.warning(
            "%s: validation loss %.3f nats a token, and word frequencies alone give %.3f: nothing was learned from context; train longer, "
            "or with a lower learning rate or a longer warm-up",
            where, valid_nats, frequencies_nats,
        )  # fmt: skip


def check_file(path: Path) -> None:
    """Raise DataError when a result cannot become the file ``path``, before the work that it would come from."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; expected a file name")


def check_output(output: Path, model: Path, *, overwrite: bool) -> None:
    """Raise DataError when ``output`` is in use, or is the model itself."""
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"{output}: is a file; expected a directory to write the model to")
    if output.resolve() == model.resolve():
        raise DataError(f"{output}: is the model itself; choose another output folder")
    if not any(output.iterdir()):
        return
    if not (output / "config.json").is_file():
        raise DataError(
            f"{output}: exists and is not a model directory, so it is never overwritten; choose another output folder"
        )
    if not overwrite:
        raise DataError(f"{output}: exists already; choose another output folder or give --overwrite")
