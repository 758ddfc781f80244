"""Measuring the sensitivities of a language model on blocks of a text, by any measure that needs nothing but the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mixbits.errors import SpecError
from mixbits.lm.corpus import TokenStream, encode_file, token_batches
from mixbits.pipeline.checks import check_text
from mixbits.pipeline.prepare import training_context
from mixbits.pipeline.settings import MeasureSettings
from mixbits.quant.measures import MEASURES
from mixbits.quant.sensitivity import Sensitivities
from mixbits.quant.units import find_units
from mixbits.spec import DEFAULT_SPECS, BitAllocation, parse_specs

MEASURE_NAMES: tuple[str, ...] = get_args(MeasureSettings.model_fields["measure"].annotation)
"""What ``MeasureSettings.measure`` may be."""


def measure_stream(
    model: Any,
    stream: TokenStream,
    settings: MeasureSettings,
    *,
    context: int,
    around: BitAllocation | None = None,
    show_progress: bool = False,
) -> Sensitivities:
    """Sensitivities of ``model`` by ``settings.measure`` on blocks drawn from a token stream.

    around: hold the other units fake-quantized at this allocation.
    """
    batches = token_batches(
        stream, context=context, num_blocks=settings.num_blocks, micro_batch=settings.micro_batch, seed=settings.seed
    )
    options: dict[str, Any] = {} if settings.measure == "fisher" else {"micro_batch_size": settings.micro_batch}
    if settings.measure == "hessian":
        options["num_probes"] = settings.num_probes
    return MEASURES[settings.measure](
        model, find_units(model), batches, parse_specs(settings.specs),
        seed=settings.seed, around=around, show_progress=show_progress,
        provenance={"text_sha256": stream.sha256}, **options,
    )  # fmt: skip


def measure_sensitivities(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    *,
    measure: str = "fisher",
    specs: Sequence[str] = DEFAULT_SPECS,
    num_probes: int = 50,
    num_blocks: int = 32,
    context: int | None = None,
    seed: int = 0,
    around: BitAllocation | None = None,
    show_progress: bool = False,
) -> Sensitivities:
    """Sensitivities of ``model`` on ``num_blocks`` blocks of a text file. Raises SpecError for an unknown measure, DataError for a text that does not fit."""
    if measure not in MEASURE_NAMES:
        raise SpecError(f"measure is {measure!r}; expected one of {', '.join(MEASURE_NAMES)}")
    settings = MeasureSettings(
        measure=measure, num_probes=num_probes, num_blocks=num_blocks, specs=tuple(map(str, specs)), seed=seed
    )  # type: ignore[arg-type]
    stream = encode_file(tokenizer, text)
    check_text(stream, 1, text)
    return measure_stream(
        model, stream, settings, context=context or training_context(model), around=around, show_progress=show_progress
    )
