"""What a recipe would do, without doing it: sizes, budgets, missing files. Needs neither data nor training.

Without the texts the vocabulary has as many made-up words as the recipe allows (10,000 where it says nothing), so that sizes are those of a full
vocabulary. All checks that need no text are the experiment's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbits.lm.presets import build_model
from mixbits.lm.tokenizer import load_tokenizer, word_tokenizer
from mixbits.pipeline.experiment import check_rows
from mixbits.pipeline.prepare import prepare_text
from mixbits.pipeline.settings import ExperimentSettings
from mixbits.quant.allocate import budget_bytes
from mixbits.quant.units import find_units
from mixbits.spec import BitAllocation, QuantSpec, compression_ratio, predicted_bytes

_USUAL_VOCABULARY = 10_000


@dataclass(frozen=True)
class PlannedRow:
    """``how``: its spec, or what its bits are learned by; ``bytes``: of a uniform file, or the budget of a learned one."""

    name: str
    how: str
    bytes: int
    ratio: float


@dataclass(frozen=True)
class Plan:
    """``missing``: files that the recipe names and that are not there; ``vocabulary`` is made up if a text is among them."""

    num_parameters: int
    full_bytes: int
    vocabulary: int
    rows: tuple[PlannedRow, ...]
    missing: tuple[str, ...]
    num_runs: int


def files_of(settings: ExperimentSettings) -> list[str]:
    """Texts, then n-best lists."""
    speech = settings.speech
    lists = [] if speech is None else [speech.dev, *speech.test.values()]
    return [*settings.text.train, settings.text.valid, settings.text.test, *lists]


def plan(settings: ExperimentSettings) -> Plan:
    """Check a recipe and say what it would do. Raises what the experiment would: SpecError for rows or budgets, DataError for bad text."""
    missing = tuple(path for path in files_of(settings) if not Path(path).is_file())
    texts = files_of(settings)[: len(settings.text.train) + 2]
    tokenizer = _made_up_tokenizer(settings) if set(missing) & set(texts) else prepare_text(settings).tokenizer
    inventory = find_units(build_model(settings.model, tokenizer, seed=settings.seed))
    check_rows(settings, inventory)
    rows = []
    for row in settings.rows:
        if row.spec is not None:
            size = predicted_bytes(inventory, BitAllocation.uniform(inventory, QuantSpec.parse(row.spec)))
            how = row.spec
        else:
            size = budget_bytes(inventory, ratio=row.ratio)
            how = f"learned by {row.measure or settings.measure.measure}"
        how += f", {row.settings(settings.quantize).method}"
        rows.append(PlannedRow(row.name, how, size, compression_ratio(inventory, size)))
    return Plan(
        inventory.num_parameters, inventory.full_bytes, len(tokenizer), tuple(rows), missing, len(settings.seeds) or 1
    )


def _made_up_tokenizer(settings: ExperimentSettings) -> Any:
    if settings.vocabulary.path is not None:
        return load_tokenizer(settings.vocabulary.path)
    count = settings.vocabulary.max_words or _USUAL_VOCABULARY
    return word_tokenizer((f"word{i}" for i in range(count)), max_length=settings.model.context)
