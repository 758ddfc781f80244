"""One recipe, one fair comparison: full precision, full precision trained on, uniform bits, learned bits.

Rules (they hold for every experiment): all quantized rows start from ``full`` and share trainer, epochs, teacher and scale
granularity; ``full-continued`` gets the same extra epochs, learning rate and teacher; the baseline is the better of
``full`` and ``full-continued`` on *validation*; every choice is made on validation and test is read once, at the end; learned rows are
compared with uniform ones at equal bytes by interpolating log-perplexity between the two neighbouring uniform rows;
differences are paired over sentences. All figures of packed models come from the files on disk, loaded back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream
from mixbits.lm.perplexity import Perplexity, from_nll, perplexity
from mixbits.lm.presets import build_model
from mixbits.pipeline.checks import check_text
from mixbits.pipeline.compress import measure_stream
from mixbits.pipeline.evaluate import load_scorer
from mixbits.pipeline.prepare import PreparedText, prepare_text
from mixbits.pipeline.quantize import pack, train_quantized
from mixbits.pipeline.rows import TrainedRow, fingerprint, run_row
from mixbits.pipeline.settings import ExperimentSettings, Row, validate
from mixbits.pipeline.summarize import Evaluated, summarize
from mixbits.pipeline.train import train_continued, train_full
from mixbits.quant.allocate import allocate, budget_bytes, check_budget
from mixbits.quant.sensitivity import Sensitivities, read_sensitivities, write_sensitivities
from mixbits.quant.units import find_units
from mixbits.runs import read_json, write_json
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, parse_specs
from mixbits.summary import write_summary

SUMMARY_FILE, SETTINGS_FILE = "summary.json", "settings.json"


def run_experiment(
    settings: ExperimentSettings, folder: str | Path, *, command: str = "", show_progress: bool = True
) -> Path:
    """Run a recipe into ``folder`` and return the path of its ``summary.json``.

    Rows that are already there with the same settings and data are not trained again; an interrupted row is resumed; rows may be
    added. Raises, before anything is trained or touched: DataError when ``folder`` holds a run with other settings or other text, or a
    file is missing; SpecError when a budget cannot be met.
    """
    folder = Path(folder)
    check_same_settings(settings, folder / SETTINGS_FILE)
    text = prepare_text(settings)
    _check_before_training(settings, text)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS_FILE, settings.model_dump())
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
    evaluated = {n: Evaluated(n, t, _evaluate(t, text.test, settings.model.context)) for n, t in trained.items()}
    baseline = baseline_name(trained)
    speech = _rescore(settings, trained, baseline, folder, show_progress=show_progress)
    summary = summarize(settings, text, inventory, evaluated, baseline, allocations, sensitivities, speech, command)
    path = folder / SUMMARY_FILE
    write_summary(path, summary)
    return path


def check_same_settings(settings: ExperimentSettings, path: Path) -> None:
    """Raise DataError naming the settings that differ from those a folder's rows were made with.

    Title, speech lists and the texts' paths may change (their content is checked with each row), and rows may come and go.
    """
    if not path.is_file():
        return
    kept = validate(ExperimentSettings, read_json(path), where=str(path))
    names = ("vocabulary", "model", "full", "quantize", "measure", "seed")
    changed = [name for name in names if getattr(kept, name) != getattr(settings, name)]
    if kept.text.max_train_words != settings.text.max_train_words:
        changed.append("text.max_train_words")
    before = {row.name: row for row in kept.rows}
    changed += [f"row {row.name}" for row in settings.rows if before.get(row.name, row) != row]
    if changed:
        raise DataError(
            f"{path.parent}: holds a run with other settings ({', '.join(changed)}); choose another output folder or remove this one"
        )


def _check_before_training(settings: ExperimentSettings, text: PreparedText) -> None:
    """Budgets that cannot be met, text that is too short and missing lists are refused before hours of training."""
    inventory = find_units(build_model(settings.model, text.tokenizer, seed=settings.seed))
    for row in settings.rows:
        if row.spec is not None:
            QuantSpec.parse(row.spec)
        else:
            specs = parse_specs(row.specs or settings.measure.specs)
            unmeasured = set(specs) - set(parse_specs(settings.measure.specs))
            if unmeasured:
                raise SpecError(f"row {row.name}: specs {', '.join(map(str, unmeasured))} are not among measure.specs")
            check_budget(inventory, specs, max_bytes=budget_bytes(inventory, ratio=row.ratio))
    for name in ("train", "valid", "test"):
        check_text(getattr(text, name), settings.model.context if name != "test" else 1, f"text.{name}")
    lists = [settings.speech.dev, *settings.speech.test.values()] if settings.speech else []
    for path in lists:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such n-best list")


def row_allocation(row: Row, inventory: ModelInventory, sensitivities: Sensitivities) -> BitAllocation:
    """The bits of a row: uniform, or learned under its budget."""
    if row.spec is not None:
        return BitAllocation.uniform(inventory, QuantSpec.parse(row.spec))
    specs = None if row.specs is None else parse_specs(row.specs)
    return allocate(inventory, sensitivities, max_bytes=budget_bytes(inventory, ratio=row.ratio), specs=specs)


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


def baseline_name(trained: Mapping[str, TrainedRow]) -> str:
    """What losses are measured against: the better of the two full-precision rows on validation."""
    return min(("full", "full-continued"), key=lambda name: trained[name].record["valid_nats"])


def _rescore(
    settings: ExperimentSettings, trained: Mapping[str, TrainedRow], baseline: str, folder: Path, *, show_progress: bool
) -> dict[str, Any] | None:
    if settings.speech is None:
        return None
    from mixbits.pipeline.rescore import rescore_systems

    return rescore_systems(
        {name: row.model for name, row in trained.items()},
        settings.speech.dev,
        settings.speech.test,
        reference_system=baseline,
        lower_case=settings.speech.lower_case,
        seed=settings.seed,
        show_progress=show_progress,
        cache=folder / "scores",
    )
