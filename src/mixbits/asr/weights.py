"""Rescoring weights as a file: what they multiply is told in :mod:`mixbits.asr.features`.

The file names the model and the dev lists that the weights were tuned on (by hash) and the dev utterances (by id), so that
weights are never reported on the lists they were tuned on without somebody insisting.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mixbits.asr.atomic import atomic_binary_file
from mixbits.asr.nbest import NBest
from mixbits.errors import DataError, FormatError

FORMAT_VERSION = 1
FORMAT_NAME = "mixbits-rescoring-weights"


@dataclass(frozen=True)
class Weights:
    """Multipliers of the features, and where they come from. The penalties are *added* per word."""

    acoustic_scale: float = 1.0
    first_pass_lm_scale: float = 0.0
    neural_lm_scale: float = 0.0
    word_insertion_penalty: float = 0.0
    unknown_word_penalty: float = 0.0
    ngram_scale: float = 0.0
    model_hash: str | None = None
    data_hash: str | None = None
    seed: int | None = None
    dev_errors: int | None = None
    dev_words: int | None = None
    dev_utterances: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in SCALES:
            if not math.isfinite(getattr(self, name)):
                raise DataError(f"weight {name} is {getattr(self, name)}; expected a finite number")
        object.__setattr__(self, "dev_utterances", tuple(self.dev_utterances))

    def as_array(self) -> npt.NDArray[np.float64]:
        """In the order of :data:`mixbits.asr.features.FEATURES`."""
        return np.array([getattr(self, name) for name in SCALES], dtype=np.float64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON; the file appears only when complete."""
        record = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, **asdict(self)}
        with atomic_binary_file(path) as file:
            file.write(json.dumps(record, ensure_ascii=False, indent=1).encode("utf-8") + b"\n")


SCALES = (
    "acoustic_scale", "first_pass_lm_scale", "neural_lm_scale", "word_insertion_penalty", "unknown_word_penalty", "ngram_scale",
)  # fmt: skip
_LATER = {"ngram_scale"}  # files written before there was one do not have it
_OPTIONAL_TYPES: dict[str, type] = {
    "model_hash": str,
    "data_hash": str,
    "seed": int,
    "dev_errors": int,
    "dev_words": int,
}


def load_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a weights file.

    Raises:
        DataError: no such file. FormatError: not a weights file of this version, unknown or mistyped fields.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            record = json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}; expected a weights file") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: not a weights file: {error}") from error
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT_NAME:
        raise FormatError(f"{name}: not a weights file; expected a JSON object with format {FORMAT_NAME!r}")
    version = record.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise FormatError(f"{name}: format version {version!r}; this mixbits reads version {FORMAT_VERSION}")
    unknown = sorted(set(record) - {field.name for field in fields(Weights)})
    missing = sorted(set(SCALES) - _LATER - set(record))
    if unknown or missing:
        raise FormatError(f"{name}: unknown fields {unknown}, missing fields {missing}")
    for field_name, value in record.items():
        _check_type(name, field_name, value)
    return Weights(**record)


def check_no_overlap(weights: Weights, lists: Iterable[NBest], *, allow_overlap: bool = False) -> None:
    """Refuse lists that share utterances with the dev lists of the weights.

    Raises:
        DataError: naming an utterance in both, unless ``allow_overlap``.
    """
    if allow_overlap:
        return
    dev = set(weights.dev_utterances)
    shared = [entry.utterance for entry in lists if entry.utterance in dev]
    if shared:
        raise DataError(
            f"{len(shared)} utterances (first: {shared[0]!r}) are among those the weights were tuned on; "
            "report on other lists, or allow the overlap on purpose"
        )


def _check_type(path: str, name: str, value: Any) -> None:
    if name in SCALES:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        expected = "a finite number"
    elif name == "dev_utterances":
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        expected = "a list of strings"
    else:
        kind = _OPTIONAL_TYPES[name]
        good = value is None or (isinstance(value, kind) and not isinstance(value, bool))
        expected = f"{kind.__name__} or null"
    if not good:
        raise FormatError(f"{path}: field {name!r} must be {expected}, got {str(value)[:40]!r}")
