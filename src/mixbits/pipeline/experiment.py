"""One recipe, one fair comparison: full precision, full precision trained on, uniform bits, learned bits.

Rules (they hold for every experiment): all quantized rows start from ``full`` and share trainer, epochs, teacher and scale
granularity; ``full-continued`` gets the same extra epochs, learning rate and teacher; the baseline is the better of
``full`` and ``full-continued`` on *validation*; every choice is made on validation and test is read once, at the end; learned rows are
compared with uniform ones at equal bytes by interpolating log-perplexity between the two neighbouring uniform rows;
differences are paired over sentences. All figures of packed models come from the files on disk, loaded back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream
from mixbits.lm.perplexity import Perplexity, from_nll, paired_difference, perplexity
from mixbits.pipeline.compress import measure_stream
from mixbits.pipeline.evaluate import load_scorer
from mixbits.pipeline.prepare import PreparedText, prepare_text
from mixbits.pipeline.quantize import pack, train_quantized
from mixbits.pipeline.rows import TrainedRow, fingerprint, run_row
from mixbits.pipeline.settings import ExperimentSettings, Row
from mixbits.pipeline.train import train_continued, train_full
from mixbits.quant.allocate import allocate, budget_bytes
from mixbits.quant.sensitivity import Sensitivities, read_sensitivities, write_sensitivities
from mixbits.quant.units import find_units
from mixbits.runs import versions, write_json
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, bits_per_weight, compression_ratio
from mixbits.summary import write_summary

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class _Evaluated:
    """A trained row with its test perplexity."""

    name: str
    trained: TrainedRow
    result: Perplexity


def run_experiment(
    settings: ExperimentSettings, folder: str | Path, *, command: str = "", show_progress: bool = True
) -> Path:
    """Run a recipe into ``folder`` and return the path of its ``summary.json``.

    Rows that are already there with the same settings and data are not trained again; an interrupted row is resumed. Raises the
    errors of the stages; nothing is lost by stopping.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", settings.model_dump())
    text = prepare_text(settings)
    full = train_full(settings, text, folder / "full", show_progress=show_progress)
    continued = train_continued(settings, text, full, folder / "full-continued", show_progress=show_progress)
    inventory = find_units(load_model(full.model)[0])
    sensitivities = _sensitivities(settings, text, full, folder, show_progress=show_progress)
    allocations = {row.name: row_allocation(row, inventory, sensitivities) for row in settings.rows}
    trained = {"full": full, "full-continued": continued}
    for row in settings.rows:
        trained[row.name] = _train_row(
            settings, row, text, full, allocations[row.name], folder, show_progress=show_progress
        )
    evaluated = {n: _Evaluated(n, t, _evaluate(t, text.test, settings.model.context)) for n, t in trained.items()}
    speech = _rescore(settings, trained, folder, show_progress=show_progress)
    summary = _summarize(settings, text, inventory, evaluated, allocations, sensitivities, speech, command)
    path = folder / SUMMARY_FILE
    write_summary(path, summary)
    return path


def row_allocation(row: Row, inventory: ModelInventory, sensitivities: Sensitivities) -> BitAllocation:
    """The bits of a row: uniform, or learned under its budget."""
    if row.spec is not None:
        return BitAllocation.uniform(inventory, QuantSpec.parse(row.spec))
    return allocate(inventory, sensitivities, max_bytes=budget_bytes(inventory, ratio=row.ratio))


def _sensitivities(
    settings: ExperimentSettings, text: PreparedText, full: TrainedRow, folder: Path, *, show_progress: bool
) -> Sensitivities:
    key = fingerprint(model_hash(full.model), settings.measure.model_dump(), text.train.sha256)
    path = folder / f"sensitivities-{key[:12]}.json"
    if path.is_file():
        return read_sensitivities(path)
    model, _ = load_model(full.model)
    found = measure_stream(
        model, text.train, settings.measure, context=settings.model.context, show_progress=show_progress
    )
    write_sensitivities(path, found)
    return found


def _train_row(
    settings: ExperimentSettings,
    row: Row,
    text: PreparedText,
    full: TrainedRow,
    allocation: BitAllocation,
    folder: Path,
    *,
    show_progress: bool,
) -> TrainedRow:
    quantize = settings.quantize.model_copy(update={"method": row.method or settings.quantize.method})
    full_hash = model_hash(full.model)
    key = fingerprint("row", full_hash, allocation.to_json()["specs"], quantize.model_dump(), text.hashes)

    def work(train_folder: Path, model_folder: Path) -> dict[str, Any]:
        model, _ = load_model(full.model)
        teacher = load_model(full.model)[0] if quantize.train.teacher_weight else None
        weights, record = train_quantized(
            model, text.train, text.valid, allocation, quantize, train_folder,
            teacher=teacher, title=row.name, show_progress=show_progress,
        )  # fmt: skip
        card = {"source model sha256": full_hash, "training text sha256": text.train.sha256, "method": quantize.method}
        saved = pack(model, text.tokenizer, allocation, weights, model_folder, card=card, overwrite=True)
        return record | {"method": quantize.method, "bytes": saved.file_bytes}

    return run_row(folder / row.name, key, work)


def _evaluate(row: TrainedRow, test: TokenStream, context: int) -> Perplexity:
    """Test perplexity of the model as it lies on disk; kept beside it, because reading test again must give the same."""
    cache = row.folder / "test.npz"
    key = fingerprint(model_hash(row.model), test.sha256, context)
    if cache.is_file():
        with np.load(cache) as kept:
            if str(kept["key"]) == key:
                return from_nll(kept["nll"], test, context=context, stride=max(1, context // 2))
    model, _ = load_scorer(row.model)
    result = perplexity(model, test, context=context)
    partial = row.folder / "test.partial.npz"
    np.savez(partial, key=np.array(key), nll=result.nll)
    partial.rename(cache)
    return result


def _rescore(
    settings: ExperimentSettings, trained: Mapping[str, TrainedRow], folder: Path, *, show_progress: bool
) -> dict[str, Any] | None:
    if settings.speech is None:
        return None
    from mixbits.pipeline.rescore import rescore_systems

    return rescore_systems(
        {name: row.model for name, row in trained.items()},
        settings.speech.dev,
        settings.speech.test,
        lower_case=settings.speech.lower_case,
        seed=settings.seed,
        show_progress=show_progress,
        cache=folder / "scores",
    )


def equal_bytes(
    learned: str,
    sizes: Mapping[str, int],
    results: Mapping[str, Perplexity],
    uniform: Sequence[str],
    stream: TokenStream,
) -> dict[str, Any]:
    """A learned row against the uniform curve at its own bytes: log-perplexity interpolated linearly in bytes.

    The difference is paired token by token with the same interpolation of the two neighbours' log-probabilities.
    """
    size = sizes[learned]
    below = max((u for u in uniform if sizes[u] <= size), key=lambda u: sizes[u], default=None)
    above = min((u for u in uniform if sizes[u] >= size), key=lambda u: sizes[u], default=None)
    if below is None or above is None:
        return {"name": learned, "neighbours": [], "verdict": f"no uniform rows on both sides of {size:,} bytes"}
    span = sizes[above] - sizes[below]
    share = 0.0 if span == 0 else (size - sizes[below]) / span
    mixed = (1 - share) * results[below].nll.astype(np.float64) + share * results[above].nll.astype(np.float64)
    reference = from_nll(mixed, stream, context=results[below].context, stride=results[below].stride)
    delta, stderr = paired_difference(results[learned], reference, stream)
    return {
        "name": learned,
        "interpolated_nats": reference.nats_per_token,
        "nats": results[learned].nats_per_token,
        "delta_nats": delta,
        "delta_nats_stderr": stderr,
        "neighbours": [below, above],
        "verdict": _verdict(delta, stderr),
    }


def _verdict(delta: float, stderr: float) -> str:
    change = f"{100 * np.expm1(delta):+.2f} % perplexity"
    if abs(delta) <= 2 * stderr:
        return (
            f"learned bits and uniform bits cannot be told apart at equal bytes ({change}, within two standard errors)"
        )
    word = "better" if delta < 0 else "not better"
    return f"learned bits are {word} than uniform bits at equal bytes ({change})"


def _row_json(
    item: _Evaluated,
    baseline: _Evaluated,
    inventory: ModelInventory,
    text: PreparedText,
    speech: Mapping[str, Any] | None,
) -> dict[str, Any]:
    record, result = item.trained.record, item.result
    size = int(record.get("bytes") or inventory.full_bytes)
    delta, stderr = paired_difference(result, baseline.result, text.test)
    row = {
        "name": item.name,
        "bytes": size,
        "ratio": compression_ratio(inventory, size),
        "bits_per_weight": bits_per_weight(inventory, size),
        "ppl": result.ppl,
        "ppl_stderr": result.ppl_stderr,
        "wer": None,
        "p_value_vs_full": None,
        "valid_ppl": float(np.exp(record["valid_nats"])),
        "nats": result.nats_per_token,
        "delta_nats": delta,
        "delta_nats_stderr": stderr,
        "method": record.get("method"),
        "epochs": record.get("epochs"),
        "train_seconds": record.get("train_seconds"),
    }
    return row | dict((speech or {}).get("rows", {}).get(item.name, {}))


def _summarize(
    settings: ExperimentSettings,
    text: PreparedText,
    inventory: ModelInventory,
    evaluated: Mapping[str, _Evaluated],
    allocations: Mapping[str, BitAllocation],
    sensitivities: Sensitivities,
    speech: Mapping[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    full, continued = evaluated["full"], evaluated["full-continued"]
    baseline = min(full, continued, key=lambda e: e.trained.record["valid_nats"])
    rows = [_row_json(e, baseline, inventory, text, speech) for e in evaluated.values()]
    if speech is not None:
        rows.insert(0, {"name": "first-pass", "bytes": None, "ratio": None, "bits_per_weight": None, "ppl": None,
                        "ppl_stderr": None, **speech["rows"]["first-pass"]})  # fmt: skip
    method = settings.quantize.method
    uniform = [r.name for r in settings.rows if r.spec is not None and (r.method or method) == method]
    sizes = {n: int(e.trained.record["bytes"]) for n, e in evaluated.items() if e.trained.record.get("bytes")}
    results = {n: e.result for n, e in evaluated.items()}
    learned = [r.name for r in settings.rows if r.ratio is not None]
    stored = (full.trained.model / "model.safetensors").stat().st_size
    return {
        "format": "mixbits-summary",
        "format_version": 1,
        "title": settings.title,
        "seed": settings.seed,
        "versions": versions(),
        "command": command,
        "data": {
            **text.hashes,
            "vocabulary": len(text.tokenizer),
            "unknown_share_test": text.test.num_unknown / text.test.num_words,
        },
        "baseline": baseline.name,
        "rows": rows,
        "equal_bytes": [equal_bytes(n, sizes, results, uniform, text.test) for n in learned],
        "allocations": {n: {u: str(s) for u, s in a.specs.items()} for n, a in allocations.items()},
        "unit_weights": {u.name: u.num_weights for u in inventory.units},
        "sensitivity": _sensitivity_json(sensitivities),
        "asr": {k: v for k, v in speech.items() if k != "rows"} if speech else {},
        "notes": [
            f"Full precision is counted as 4 bytes x {inventory.num_parameters:,} distinct parameters = {inventory.full_bytes:,} bytes; "
            f"its stored file has {stored:,}.",
            "Unknown words are predicted as one <unk> each.",
            f"Test perplexity: sliding window of {settings.model.context} tokens, stride {max(1, settings.model.context // 2)}, float32, "
            "models loaded back from disk; standard errors over sentences.",
        ],
        "settings": settings.model_dump(),
        "training_logs": {n: e.trained.record.get("log", []) for n, e in evaluated.items()},
    }


def _sensitivity_json(sensitivities: Sensitivities) -> dict[str, Any]:
    units = {}
    for name, unit in sensitivities.units.items():
        trace = unit.trace
        units[name] = {
            "trace": None if trace is None else trace.trace,
            "trace_stderr": None if trace is None else trace.trace_stderr,
            "sensitivity": {str(spec): value for spec, value in unit.loss_increase.items()},
        }
    return {"measure": sensitivities.measure, "units": units}
