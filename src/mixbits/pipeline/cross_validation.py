"""Rescoring a list without a dev list: each part with weights tuned on the other parts.

Parts are made of whole speakers (or conversations) where the list names them, else of utterances, in an order drawn from the seed. The
output is that of several sets of weights which are nearly alike; no utterance was rescored with weights that saw its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixbits.asr.formats.jsonl import NBestFile
from mixbits.asr.nbest import NBest, reference_texts
from mixbits.asr.rescore import LmFeatures, Rescored, apply_weights
from mixbits.asr.tune import tune_on_lists
from mixbits.asr.weights import Weights
from mixbits.errors import DataError, SpecError
from mixbits.pipeline.lm_scores import SpeechModel
from mixbits.pipeline.scoring import ScoreSettings


@dataclass(frozen=True)
class CrossValidated:
    """``rescored``: every list with the weights of the parts it is not in. ``weights``: tuned on all lists, for other data."""

    rescored: Rescored
    weights: Weights
    lm: LmFeatures | None
    unit: str


def folds_of(lists: Sequence[NBest], num_folds: int, *, seed: int) -> tuple[list[list[int]], str]:
    """Numbers of the utterances of each part, and what the parts are made of: "speakers", "conversations" or "utterances".

    Raises:
        SpecError: fewer than two parts. DataError: fewer speakers (or utterances) than parts.
    """
    if num_folds < 2:
        raise SpecError(f"{num_folds} parts to cross-validate over; expected at least 2")
    unit, names = "utterances", [entry.utterance for entry in lists]
    for field in ("conversation", "speaker"):
        found = [getattr(entry, field) for entry in lists]
        if None not in found and len(set(found)) >= num_folds:
            unit, names = f"{field}s", found
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name, []).append(number)
    if len(groups) < num_folds:
        raise DataError(f"{len(groups)} {unit} for {num_folds} parts; expected at least one each: ask for fewer parts")
    keys = sorted(groups)
    order = np.random.default_rng(seed).permutation(len(keys))
    folds: list[list[int]] = [[] for _ in range(num_folds)]
    for place, key in enumerate(order):
        folds[place % num_folds].extend(groups[keys[key]])
    return [sorted(fold) for fold in folds], unit


def cross_validate(
    model: SpeechModel | None, file: NBestFile, *, settings: ScoreSettings, num_folds: int, seed: int = 0
) -> CrossValidated:
    """Rescore ``file`` (all with references) part by part; ``model`` None tunes the first pass alone.

    Raises:
        SpecError: history "rescored", which would make a part's scores depend on its own weights.
    """
    if settings.history == "rescored":
        raise SpecError("history 'rescored' needs weights from a dev list or a file; cross-validate with 'first-pass'")
    reference_texts(file)
    lists, lm = (file, None) if model is None else settings.apart(model, file)
    folds, unit = folds_of(file.lists, num_folds, seed=seed)
    done: list[NBest | None] = [None] * len(lists)
    picks = np.zeros(len(lists), dtype=np.int64)
    for fold in folds:
        rest = sorted(set(range(len(lists))) - set(fold))
        weights = _tune([lists[number] for number in rest], lm and lm.part(lists, rest), seed=seed)
        part = apply_weights([lists[number] for number in fold], lm and lm.part(lists, fold), weights)
        picks[fold] = part.picks
        for number, entry in zip(fold, part.lists, strict=True):
            done[number] = entry
    weights = _tune(lists, lm, seed=seed)
    weights = replace(weights, model_hash=None if model is None else model.model_hash, data_hash=file.data_hash)
    assert None not in done
    return CrossValidated(Rescored(tuple(done), picks), weights, lm, unit)  # type: ignore[arg-type]


def _tune(lists: Sequence[NBest], lm: LmFeatures | None, *, seed: int) -> Weights:
    if lm is None:
        return tune_on_lists(lists, seed=seed).weights
    return tune_on_lists(
        lists, neural_lm_score=lm.neural_lm_score, num_unknown=lm.num_unknown, ngram_score=lm.ngram_score, seed=seed
    ).weights
