"""One recipe, one fair comparison: full precision, full precision trained on, uniform bits, learned bits.

Rules (they hold for every experiment): all quantized rows start from ``full`` and share trainer, epochs, teacher and scale
granularity; ``full-continued`` gets the same extra epochs, learning rate and teacher; the baseline is the better of
``full`` and ``full-continued`` on *validation*; every choice is made on validation and test is read once, at the end; learned rows are
compared with uniform ones at equal bytes by interpolating log-perplexity between the two neighbouring uniform rows;
differences are paired over sentences. All figures of packed models come from the files on disk, loaded back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream
from mixbits.lm.perplexity import Perplexity, from_nll, perplexity
from mixbits.lm.presets import build_model
from mixbits.pipeline.checks import check_text
from mixbits.pipeline.evaluate import load_scorer
from mixbits.pipeline.manifest import write_manifest
from mixbits.pipeline.measuring import Measuring, prototype_rows
from mixbits.pipeline.prepare import PreparedText, prepare_text, training_sentences
from mixbits.pipeline.quantize import train_and_pack
from mixbits.pipeline.rows import TrainedRow, fingerprint, run_row
from mixbits.pipeline.settings import ExperimentSettings, Row, SpeechNgram, validate
from mixbits.pipeline.summarize import Evaluated, Finished, average_seeds, baseline_name, summarize
from mixbits.pipeline.train import train_continued, train_full
from mixbits.pipeline.workplace import locked
from mixbits.quant.allocate import allocate, budget_bytes, check_budget
from mixbits.quant.groups import group_units
from mixbits.quant.progressive import check_stages
from mixbits.quant.units import find_units
from mixbits.quant.warmstart import starting_weights
from mixbits.runs import read_json, write_json
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, parse_specs
from mixbits.summary import write_summary

SUMMARY_FILE, SETTINGS_FILE = "summary.json", "settings.json"


def run_experiment(
    settings: ExperimentSettings, folder: str | Path, *, command: str = "", show_progress: bool = True
) -> Path:
    """Run a recipe into ``folder`` and return the path of its ``summary.json``.

    Rows that are already there with the same settings and data are not trained again; an interrupted row is resumed; rows may be
    added. Raises, before anything is trained or touched: DataError when ``folder`` holds a run with other settings or other text, another
    process is at work in it, or a file is missing; SpecError when a budget cannot be met.
    """
    folder = Path(folder)
    path = folder / SUMMARY_FILE
    if settings.seeds:
        runs = []
        for seed in settings.seeds:
            one, place = settings.for_seed(seed), folder / f"seed-{seed}"
            runs.append(run_seed(one, place, show_progress=show_progress))
            _write_manifest(one, runs[-1], place)
        write_summary(path, summarize(settings, average_seeds(runs), command))
        return path
    found = run_seed(settings, folder, show_progress=show_progress)
    write_summary(path, summarize(settings, found, command))
    _write_manifest(settings, found, folder)
    return path


def _write_manifest(settings: ExperimentSettings, found: Finished, folder: Path) -> None:
    write_manifest(
        folder,
        seed=settings.seed,
        settings=settings,
        data=found.text.hashes,
        models={name: item.trained.model for name, item in found.evaluated.items()},
        sensitivities=found.measured.values(),
        allocations=found.allocations,
    )


def run_seed(settings: ExperimentSettings, folder: Path, *, show_progress: bool = True) -> Finished:
    """One seed's rows, trained (or found finished) and evaluated. Raises what :func:`run_experiment` raises."""
    check_same_settings(settings, folder / SETTINGS_FILE)
    text = prepare_text(settings)
    _check_before_training(settings, text)
    with locked(folder):
        return _run_rows(settings, text, folder, show_progress=show_progress)


def _run_rows(settings: ExperimentSettings, text: PreparedText, folder: Path, *, show_progress: bool) -> Finished:
    write_json(folder / SETTINGS_FILE, settings.model_dump())
    full = train_full(settings, text, folder / "full", show_progress=show_progress)
    continued = train_continued(settings, text, full, folder / "full-continued", show_progress=show_progress)
    inventory = find_units(load_model(full.model)[0])
    trained = {"full": full, "full-continued": continued}
    measuring = Measuring(settings, text, inventory, full, folder, trained, show_progress)
    allocations = {}
    for row in sorted(settings.rows, key=_turn):
        allocations[row.name] = row_allocation(row, inventory, measuring)
        trained[row.name] = _train_row(measuring, row, allocations[row.name])
    for name in settings.compare_measures:
        measuring.by(name)
    names = ["full", "full-continued", *(row.name for row in settings.rows)]
    evaluated = {n: Evaluated(n, trained[n], _evaluate(trained[n], text.test, settings.model.context)) for n in names}
    baseline = baseline_name(trained)
    speech = _rescore(settings, text.tokenizer, trained, baseline, folder, show_progress=show_progress)
    allocations = {row.name: allocations[row.name] for row in settings.rows}
    return Finished(text, inventory, evaluated, baseline, allocations, measuring.found, speech)


def _turn(row: Row) -> int:
    """Prototypes are trained before what starts from them, and before what is learned from them."""
    return 2 if row.spec is None else int(row.start == "prototypes")


def check_same_settings(settings: ExperimentSettings, path: Path) -> None:
    """Raise DataError naming the settings that differ from those a folder's rows were made with.

    Title, speech lists and the texts' paths may change (their content is checked with each row), and rows may come and go.
    """
    if not path.is_file():
        return
    kept = validate(ExperimentSettings, read_json(path), where=str(path))
    names = ("vocabulary", "model", "full", "quantize", "measure", "search", "seed")
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
    check_rows(settings, find_units(build_model(settings.model, text.tokenizer, seed=settings.seed)))
    for name in ("train", "valid", "test"):
        check_text(getattr(text, name), settings.model.context if name != "test" else 1, f"text.{name}")
    lists = [settings.speech.dev, *settings.speech.test.values()] if settings.speech else []
    for path in lists:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such n-best list")


def check_rows(settings: ExperimentSettings, inventory: ModelInventory) -> None:
    """Raise SpecError for a row whose spec cannot be read, was not measured, whose budget cannot be met, or that lacks what it starts from."""
    for row in settings.rows:
        try:
            _check_row(settings, row, inventory)
        except SpecError as error:
            raise SpecError(f"row {row.name}: {error}") from None
    if "prototypes" in settings.compare_measures:
        _check_prototypes(settings)


def _check_row(settings: ExperimentSettings, row: Row, inventory: ModelInventory) -> None:
    stages = row.settings(settings.quantize).progressive
    if stages:
        check_stages(stages)
    if row.start == "prototypes" or row.measure == "prototypes":
        _check_prototypes(settings)
    if row.spec is not None:
        _check_method(settings, row, [QuantSpec.parse(row.spec)])
        return
    specs, offered = _offered(settings, row)
    _check_method(settings, row, specs)
    unmeasured = set(specs) - set(offered)
    if unmeasured:
        raise SpecError(
            f"specs {', '.join(map(str, sorted(unmeasured)))} are not among those measured ({', '.join(map(str, offered))})"
        )
    groups = group_units(inventory, row.granularity)
    check_budget(inventory, specs, max_bytes=budget_bytes(inventory, ratio=row.ratio), groups=groups)


def _check_method(settings: ExperimentSettings, row: Row, specs: Sequence[QuantSpec]) -> None:
    method = row.settings(settings.quantize).method
    products = [spec for spec in specs if spec.is_product]
    if products and method != "straight-through":
        raise SpecError(
            f"{method} needs grids of levels, and {products[0]} has none; leave it out with 'specs', or set method: straight-through"
        )


def _check_prototypes(settings: ExperimentSettings) -> None:
    found = prototype_rows(settings)
    if len(found) < 2:
        raise SpecError(
            f"prototypes are trained uniform rows; {len(found)} with the experiment's own method and settings, expected at least two "
            "rows with 'spec'"
        )


def _offered(settings: ExperimentSettings, row: Row) -> tuple[tuple[QuantSpec, ...], tuple[QuantSpec, ...]]:
    """The specs a learned row may take, and those that its measure will know."""
    measure = row.measure or settings.measure.measure
    if measure == "search":
        candidates = parse_specs(row.specs or settings.search.candidates)
        return candidates, candidates
    offered = tuple(prototype_rows(settings)) if measure == "prototypes" else parse_specs(settings.measure.specs)
    return (offered if row.specs is None else parse_specs(row.specs)), offered


def row_allocation(row: Row, inventory: ModelInventory, measuring: Measuring) -> BitAllocation:
    """The bits of a row: uniform, or learned under its budget."""
    if row.spec is not None:
        return BitAllocation.uniform(inventory, QuantSpec.parse(row.spec))
    if row.measure == "search" and row.choice == "one-best":
        return measuring.searched(row)
    sensitivities = measuring.for_row(row)
    specs = None if row.specs is None else parse_specs(row.specs)
    groups = group_units(inventory, row.granularity)
    budget = budget_bytes(inventory, ratio=row.ratio)
    return allocate(inventory, sensitivities, max_bytes=budget, specs=specs, groups=groups)


def _train_row(run: Measuring, row: Row, allocation: BitAllocation) -> TrainedRow:
    settings, text, full = run.settings, run.text, run.full
    quantize = row.settings(settings.quantize)
    full_hash = model_hash(full.model)
    start = run.prototype_hashes() if row.start == "prototypes" else None
    key = fingerprint("row", full_hash, allocation.to_json()["specs"], quantize.model_dump(), text.hashes, start)

    def work(train_folder: Path, model_folder: Path) -> dict[str, Any]:
        weights = None if start is None else starting_weights(run.inventory, allocation, run.prototypes())
        saved, record = train_and_pack(
            full.model, model_folder, allocation, quantize, text.train, text.valid, train_folder,
            tokenizer=text.tokenizer, source_hash=full_hash, start=weights, title=row.name, show_progress=run.show_progress,
        )  # fmt: skip
        return record | {
            "method": quantize.method,
            "bytes": saved.file_bytes,
            "measure": None if row.spec else row.measure or settings.measure.measure,
            "start": row.start,
            "grid": sorted({str(spec) for spec in allocation.specs.values()}),
            "scales": quantize.scales if quantize.method == "straight-through" else None,
        }

    return run_row(run.folder / row.name, key, work)


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
    settings: ExperimentSettings,
    tokenizer: Any,
    trained: Mapping[str, TrainedRow],
    baseline: str,
    folder: Path,
    *,
    show_progress: bool,
) -> dict[str, Any] | None:
    if settings.speech is None:
        return None
    from mixbits.pipeline.ngram import train_ngram
    from mixbits.pipeline.rescore import rescore_systems

    model, ngram = None, settings.speech.ngram or SpeechNgram()
    if settings.speech.ngram is not None:
        model = train_ngram(training_sentences(settings.text), tokenizer, order=ngram.order, prune=ngram.prune)
    return rescore_systems(
        {name: row.model for name, row in trained.items()},
        settings.speech.dev,
        settings.speech.test,
        reference_system=baseline,
        lower_case=settings.speech.lower_case,
        max_hypotheses=settings.speech.max_hypotheses,
        interpolate=settings.speech.interpolate,
        seed=settings.seed,
        show_progress=show_progress,
        cache=folder / "scores",
        ngram=model,
        ngram_mode=ngram.mode,
        ngram_weight=ngram.weight,
    )
