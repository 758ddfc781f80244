"""A rescoring run as a comparison record: first pass, first pass tuned, reference model and model on one list.

Tests: every system against the first pass, and the model against the tuned first pass and the reference model, with one Holm correction
over all of them. WER against the language model's weight is left out where the list was cross-validated: its parts have weights
of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixbits.pipeline.certified_models import weight_bytes
from mixbits.pipeline.compare import compare_systems
from mixbits.pipeline.compare_inputs import System, match_systems
from mixbits.pipeline.rescore import MODEL, REFERENCE, RescoredList
from mixbits.pipeline.speech_rows import FIRST_PASS, FIRST_PASS_TUNED


def rescoring_comparison(
    result: RescoredList,
    source: str | Path,
    model: str | Path,
    reference_model: str | Path | None = None,
    *,
    cross_validated: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """The record (:func:`mixbits.pipeline.compare.compare_systems`) of a result that kept its rankings.

    Args:
        source: the list. model, reference_model: their directories, for names and bytes.

    Raises:
        DataError: no utterance has a reference.
    """
    models = {MODEL: Path(model)} | ({} if reference_model is None else {REFERENCE: Path(reference_model)})
    order = [name for name in (FIRST_PASS, FIRST_PASS_TUNED, REFERENCE, MODEL) if name in result.rankings]
    names = {
        name: name.replace("-", " ") if name not in models else f"{name}: {_label(models[name])}" for name in order
    }
    systems = [
        System(
            names[name],
            result.rankings[name],
            str(models.get(name, source)),
            result.data_hash if name == FIRST_PASS else result.weights[name].model_hash,
            None if cross_validated else result.weights.get(name),
            weight_bytes(models[name]) if name in models else None,
        )
        for name in order
    ]
    pairs = [(names[FIRST_PASS], names[name]) for name in order[1:]]
    pairs += [(names[name], names[MODEL]) for name in (FIRST_PASS_TUNED, REFERENCE) if name in names]
    record = compare_systems(match_systems(systems), pairs=pairs, seed=seed)
    return record | {"notes": [*record["notes"], *result.notes]}


def _label(directory: Path) -> str:
    return directory.name or str(directory.resolve().name)
