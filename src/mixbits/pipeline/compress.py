"""``compress``: a Hugging Face model and a text in, a packed model of the wanted size out.

Measure sensitivities, allocate bits under the byte budget, train quantized with the full-precision model as teacher, refine,
pack. Every stage leaves its file in the output's ``work`` folder, so that an interrupted run goes on where it stopped and a
measured model is solved for another budget in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream, encode_file, token_batches
from mixbits.lm.loss import mean_loss
from mixbits.pipeline.prepare import split_text, training_context
from mixbits.pipeline.quantize import pack, round_to_nearest, train_quantized
from mixbits.pipeline.rows import fingerprint, run_row
from mixbits.pipeline.settings import MeasureSettings, QuantizeSettings
from mixbits.quant.allocate import allocate, budget_bytes
from mixbits.quant.sensitivity import Sensitivities, measure_hessian, read_sensitivities, write_sensitivities
from mixbits.quant.units import find_units
from mixbits.runs import write_json
from mixbits.spec import BitAllocation, parse_specs


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` made."""

    directory: Path
    file_bytes: int
    compression_ratio: float
    bits_per_weight: float
    allocation: BitAllocation
    record: dict[str, Any]


def measure_stream(
    model: Any, stream: TokenStream, settings: MeasureSettings, *, context: int, show_progress: bool = False
) -> Sensitivities:
    """Hessian sensitivities of ``model`` on blocks drawn from a token stream."""
    batches = token_batches(
        stream, context=context, num_blocks=settings.num_blocks, micro_batch=settings.micro_batch, seed=settings.seed
    )
    return measure_hessian(
        model, find_units(model), batches, mean_loss, parse_specs(settings.specs),
        num_probes=settings.num_probes, seed=settings.seed, micro_batch_size=settings.micro_batch,
        show_progress=show_progress, provenance={"text_sha256": stream.sha256},
    )  # fmt: skip


def measure_sensitivities(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    *,
    specs: Sequence[str] = ("1", "1.58", "2", "3", "4", "8"),
    num_probes: int = 50,
    num_blocks: int = 32,
    context: int | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> Sensitivities:
    """Hessian sensitivities of ``model`` on ``num_blocks`` blocks of a text file."""
    settings = MeasureSettings(num_probes=num_probes, num_blocks=num_blocks, specs=tuple(map(str, specs)), seed=seed)
    stream = encode_file(tokenizer, text)
    return measure_stream(
        model, stream, settings, context=context or training_context(model), show_progress=show_progress
    )


def compress(
    model: str | Path,
    *,
    text: str | Path,
    output: str | Path,
    ratio: float | None = None,
    max_bytes: int | None = None,
    bits_per_weight: float | None = None,
    valid: str | Path | None = None,
    quantize: QuantizeSettings | None = None,
    measure: MeasureSettings | None = None,
    train: bool = True,
    show_progress: bool = True,
) -> Compressed:
    """Compress the model directory ``model`` to a budget, training on ``text``, and write ``output``.

    Exactly one of ``ratio`` (4 bytes x parameters over bytes of the packed weight file), ``max_bytes`` and
    ``bits_per_weight``. ``train=False`` only rounds to the nearest codes. Work files are kept in ``output``'s sibling
    ``<output>.work`` and used again. Raises SpecError at once when the budget cannot be met, naming the smallest size.
    """
    output = Path(output)
    work = output.with_name(output.name + ".work")
    full, tokenizer = load_model(model)
    inventory = find_units(full)
    budget = budget_bytes(inventory, ratio=ratio, bytes=max_bytes, bits_per_weight=bits_per_weight)
    measure = measure or MeasureSettings()
    context = training_context(full)
    quantize = quantize or QuantizeSettings()
    quantize = quantize.model_copy(update={"train": quantize.train.model_copy(update={"context": context})})
    smallest_possible(inventory, measure, budget)
    stream, held_out = split_text(tokenizer, text, valid)
    full_hash = model_hash(model)
    sensitivities = _measured(full, stream, measure, context, work, full_hash, show_progress=show_progress)
    allocation = allocate(inventory, sensitivities, max_bytes=budget)
    write_json(work / "allocation.json", allocation.to_json())
    parts = [full_hash, allocation.to_json()["specs"], quantize.model_dump(), stream.sha256, held_out.sha256, train]

    def job(folder: Path, _: Path) -> dict[str, Any]:
        student, record = load_model(model)[0], dict[str, Any]()
        if train:
            weights, record = train_quantized(
                student, stream, held_out, allocation, quantize, folder,
                teacher=full if quantize.train.teacher_weight else None, title="compress", show_progress=show_progress,
            )  # fmt: skip
        else:
            weights = round_to_nearest(student, allocation)
        card = {"source model sha256": full_hash, "training text sha256": stream.sha256, "method": quantize.method}
        saved = pack(student, tokenizer, allocation, weights, output, card=card, overwrite=True)
        return record | {
            "bytes": saved.file_bytes,
            "ratio": saved.compression_ratio,
            "bits_per_weight": saved.bits_per_weight,
        }

    key = fingerprint("compress", *parts)
    row = run_row(work / key[:16], key, job)
    return Compressed(
        output, row.record["bytes"], row.record["ratio"], row.record["bits_per_weight"], allocation, row.record
    )


def smallest_possible(inventory: Any, measure: MeasureSettings, budget: int) -> None:
    """Refuse an impossible budget before anything is measured: SpecError naming the smallest size."""
    from mixbits.quant.allocate import check_budget

    check_budget(inventory, parse_specs(measure.specs), max_bytes=budget)


def _measured(
    model: Any,
    stream: TokenStream,
    settings: MeasureSettings,
    context: int,
    work: Path,
    full_hash: str,
    *,
    show_progress: bool,
) -> Sensitivities:
    key = fingerprint("measure", full_hash, stream.sha256, settings.model_dump(), context)
    path = work / f"sensitivities-{key[:16]}.json"
    if path.is_file():
        return read_sensitivities(path)
    found = measure_stream(model, stream, settings, context=context, show_progress=show_progress)
    write_sensitivities(path, found)
    return found
