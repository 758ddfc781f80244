"""``compress``: a Hugging Face model and a text in, a packed model of the wanted size out.

Measure sensitivities, allocate bits under the byte budget, train quantized with the full-precision model as teacher, refine,
pack. Guard: the best uniform bits of no more bytes are trained as well, and the lower validation loss wins. Every stage leaves its file in ``<output>.work``, so that an interrupted run goes on where it stopped, the same call
again returns at once, and a measured model is solved for another budget in seconds. The output directory is a copy of the model
packed there, archived if asked for; budgets and ratios are those of the packed file either way.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbits.errors import DataError, FormatError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream
from mixbits.lm.perplexity import paired_difference, perplexity
from mixbits.packing.archive import archive_packed, disk_bytes
from mixbits.pipeline.checks import check_full_precision, check_output, check_text
from mixbits.pipeline.evaluate import load_scorer
from mixbits.pipeline.manifest import write_manifest
from mixbits.pipeline.measure import measure_stream
from mixbits.pipeline.prepare import split_text, training_context
from mixbits.pipeline.quantize import train_and_pack
from mixbits.pipeline.rows import TrainedRow, fingerprint, run_row
from mixbits.pipeline.settings import MeasureSettings, QuantizeSettings
from mixbits.pipeline.workplace import locked, work_folder
from mixbits.quant.allocate import allocate, allocation_notes, budget_bytes, check_budget
from mixbits.quant.guard import Measured, Winner, choose_winner, uniform_allocations
from mixbits.quant.sensitivity import Sensitivities, read_sensitivities, write_sensitivities
from mixbits.quant.units import find_units
from mixbits.runs import hash_file, read_json, write_json
from mixbits.spec import BitAllocation, ModelInventory, parse_specs

_RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` made; ``disk_bytes`` is less than ``file_bytes`` where the weight file is archived."""

    directory: Path
    file_bytes: int
    disk_bytes: int
    compression_ratio: float
    bits_per_weight: float
    allocation: BitAllocation
    record: dict[str, Any]

    @property
    def guard(self) -> str | None:
        """The verdict on learned against uniform bits, or None where it was not asked for."""
        return self.record.get("guard")

    @property
    def notes(self) -> list[str]:
        """What to know of the measuring (one probe, a single batch, …) and the allocation (unused bytes, units counted as 0)."""
        return list(self.record.get("notes", ()))


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
    guard: bool = True,
    archive: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Compressed:
    """Compress the model directory ``model`` to a budget, training on ``text``, and write ``output``.

    Exactly one of ``ratio`` (4 bytes x parameters over bytes of the packed weight file), ``max_bytes`` and
    ``bits_per_weight``. ``train=False`` only rounds to the nearest codes. ``guard`` also makes the largest uniform model that fits
    and returns it if it has less validation loss, which takes the training time twice. ``archive`` keeps the weight file of ``output``
    compressed where that saves 3 % (:mod:`mixbits.packing.archive`). ``overwrite`` replaces a model directory that is
    there, made for another budget, say. Work files are kept in ``output``'s sibling ``<output>.work``, locked meanwhile, and used again.
    Raises SpecError at once when the budget cannot be met, naming the smallest size; DataError when ``output`` is in use, by
    another process too, the model is broken or the text does not fit it.
    """
    model, output = Path(model), Path(output)
    if not output.name or output.name == "..":
        raise DataError(
            f"{output}: is not the name of a new folder; expected a model directory to write, e.g. small-model"
        )
    if not (model / "config.json").is_file():
        raise DataError(f"{model}: no config.json; expected a Hugging Face model directory (mixbits train makes one)")
    work = work_folder(output)
    measure, quantize = measure or MeasureSettings(), quantize or QuantizeSettings()
    full_hash = model_hash(model)
    budget = {"ratio": ratio, "max_bytes": max_bytes, "bits_per_weight": bits_per_weight}
    texts = [hash_file(text), None if valid is None else hash_file(valid)]
    settings = [measure.model_dump(), quantize.model_dump(), train, guard, *(["archive"] if archive else [])]
    request = fingerprint("compress", full_hash, texts, budget, *settings)
    done = _already_there(output, work, request)
    if done is not None:
        return done
    check_output(output, model, overwrite=overwrite)
    full, tokenizer = load_model(model)
    check_full_precision(full, model)
    inventory = find_units(full)
    most = budget_bytes(inventory, ratio=ratio, bytes=max_bytes, bits_per_weight=bits_per_weight)
    check_budget(inventory, parse_specs(measure.specs), max_bytes=most)
    context = training_context(full)
    quantize = quantize.model_copy(update={"train": quantize.train.model_copy(update={"context": context})})
    stream, held_out = split_text(tokenizer, text, valid)
    check_text(stream, context, text)
    if train:
        check_text(held_out, context, valid or f"{text} (held-out part)")
    job = _Job(
        model, output, work, full, tokenizer, full_hash, inventory, most, measure, quantize, train, stream, held_out, context,
        show_progress,
    )  # fmt: skip
    with locked(work):  # a place that cannot be written to is found out before the work
        return _run(job, request, guard=guard, archive=archive)


@dataclass(frozen=True)
class _Job:
    """A call of :func:`compress` that can work: its arguments, read and checked."""

    source: Path
    output: Path
    work: Path
    full: Any
    tokenizer: Any
    full_hash: str
    inventory: ModelInventory
    budget: int
    measure: MeasureSettings
    quantize: QuantizeSettings
    train: bool
    stream: TokenStream
    held_out: TokenStream
    context: int
    show_progress: bool


def _run(job: _Job, request: str, *, guard: bool, archive: bool) -> Compressed:
    """Measure, allocate, make the models, copy the winner to its place, and note what was done."""
    sensitivities = _measured(job)
    learned = allocate(job.inventory, sensitivities, max_bytes=job.budget)
    allocation, row = learned, _made(job, learned, "learned bits")
    notes: dict[str, Any] = {"notes": [*sensitivities.provenance.get("warnings", ()), *allocation_notes(learned)]}
    if guard:
        allocation, row, notes["guard"] = _guarded(job, learned, row)
    record = row.record | notes
    write_json(job.work / "allocation.json", allocation.to_json())
    _copy_directory(row.model, job.output, job.work, archive=archive)
    result = {"request": request, "weights_sha256": model_hash(job.output)}
    write_json(job.work / _RESULT_FILE, {**result, "allocation": allocation.to_json(), "record": record})
    settings = {"measure": job.measure.model_dump(), "quantize": job.quantize.model_dump()}
    write_manifest(
        job.work,
        seed=job.quantize.train.seed,
        settings={**settings, "budget": job.budget, "train": job.train},
        data={"train": job.stream.sha256, "valid": job.held_out.sha256},
        models={"full": job.source, "packed": job.output},
        sensitivities=[sensitivities],
        allocations={"learned": learned, "packed": allocation},
    )
    return _result(job.output, allocation, record)


def _guarded(job: _Job, learned: BitAllocation, row: TrainedRow) -> tuple[BitAllocation, TrainedRow, str]:
    """The learned bits, or the largest uniform ones that fit if those have less validation loss; and the verdict."""
    rivals = uniform_allocations(job.inventory, parse_specs(job.measure.specs), job.budget)
    if not rivals:
        return learned, row, f"no uniform bits fit {job.budget:,} bytes; the learned bits stand"
    uniform, name = rivals[0], str(rivals[0].provenance["method"])
    if uniform.specs == learned.specs:
        return learned, row, f"the learned bits are uniform ones: {name}"
    other = _made(job, uniform, "uniform bits")
    verdict = _compare(row, other, name, job.held_out, job.context, job.budget)
    return (learned, row, verdict.sentence) if verdict.is_learned else (uniform, other, verdict.sentence)


def _made(job: _Job, bits: BitAllocation, title: str) -> TrainedRow:
    """The packed model of an allocation, trained (or found finished) in a folder of its own."""
    parts = [bits.to_json()["specs"], job.quantize.model_dump(), job.stream.sha256, job.held_out.sha256, job.train]
    key = fingerprint("compress", job.full_hash, *parts)

    def work(train_folder: Path, model_folder: Path) -> dict[str, Any]:
        saved, record = train_and_pack(
            job.source, model_folder, bits, job.quantize if job.train else None, job.stream, job.held_out, train_folder,
            tokenizer=job.tokenizer, source_hash=job.full_hash, teacher=job.full, title=title, show_progress=job.show_progress,
        )  # fmt: skip
        size = {"bytes": saved.file_bytes, "ratio": saved.compression_ratio, "bits_per_weight": saved.bits_per_weight}
        return record | size

    return run_row(job.work / key[:16], key, work)


def _compare(
    learned: TrainedRow, uniform: TrainedRow, name: str, held_out: TokenStream, context: int, budget: int
) -> Winner:
    """Both files on the validation text, paired by sentence; of a single sentence the standard error is unknown."""
    ours, theirs = (perplexity(load_scorer(row.model)[0], held_out, context=context) for row in (learned, uniform))
    _, stderr = paired_difference(ours, theirs, held_out)
    return choose_winner(
        Measured("learned bits", learned.record["bytes"], ours.nats_per_token),
        [Measured(name, uniform.record["bytes"], theirs.nats_per_token, stderr if math.isfinite(stderr) else None)],
        budget,
    )


def _result(output: Path, allocation: BitAllocation, record: dict[str, Any]) -> Compressed:
    size = (record["bytes"], disk_bytes(output), record["ratio"], record["bits_per_weight"])
    return Compressed(output, *size, allocation, record)


def _already_there(output: Path, work: Path, request: str) -> Compressed | None:
    """The result of the very same call, if ``output`` still is what it wrote."""
    if not (work / _RESULT_FILE).is_file() or not (output / "config.json").is_file():
        return None
    kept = read_json(work / _RESULT_FILE)
    try:
        is_same = kept.get("request") == request and kept.get("weights_sha256") == model_hash(output)
    except (DataError, FormatError):  # weights gone, or a damaged archive
        is_same = False
    if not is_same:
        return None
    allocation = BitAllocation.from_json(kept["allocation"], where=str(work / _RESULT_FILE))
    return _result(output, allocation, kept["record"])


def _copy_directory(source: Path, target: Path, work: Path, *, archive: bool) -> None:
    """Copy a model directory within ``work``, then move the copy to ``target``, which was checked before."""
    partial, aside = work / "copy.partial", work / "replaced"
    for leftover in (partial, aside):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, partial)
    if archive:
        archive_packed(partial)
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _measured(job: _Job) -> Sensitivities:
    key = fingerprint("measure", job.full_hash, job.stream.sha256, job.measure.model_dump(), job.context)
    path = job.work / f"sensitivities-{key[:16]}.json"
    if path.is_file():
        return read_sensitivities(path)
    found = measure_stream(job.full, job.stream, job.measure, context=job.context, show_progress=job.show_progress)
    write_sensitivities(path, found)
    return found
