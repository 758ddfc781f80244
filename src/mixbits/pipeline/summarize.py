"""What an experiment found, as the data of ``summary.json``: rows, learned bits against uniform ones at equal bytes, logs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixbits.lm.corpus import TokenStream
from mixbits.lm.perplexity import Perplexity, from_nll, paired_difference
from mixbits.pipeline.prepare import PreparedText
from mixbits.pipeline.rows import TrainedRow
from mixbits.pipeline.settings import ExperimentSettings, QuantizeSettings, Row, portable
from mixbits.quant.allocate import allocation_notes
from mixbits.quant.measures.agreement import rank_agreement
from mixbits.quant.sensitivity import Sensitivities
from mixbits.runs import versions
from mixbits.spec import BitAllocation, ModelInventory, bits_per_weight, compression_ratio
from mixbits.summary import WITH_NGRAM


@dataclass(frozen=True)
class Evaluated:
    """A trained row with its test perplexity; averaged over seeds, ``by_seed`` holds each seed's own."""

    name: str
    trained: TrainedRow
    result: Perplexity
    by_seed: tuple[Perplexity, ...] = ()


@dataclass(frozen=True)
class Finished:
    """All that an experiment found: rows, the name of the baseline, bits, and what these were learned from.

    ``measured``: sensitivities by measure, of the first seed where there are several; "search" is the last row's.
    """

    text: PreparedText
    inventory: ModelInventory
    evaluated: Mapping[str, Evaluated]
    baseline: str
    allocations: Mapping[str, BitAllocation]
    measured: Mapping[str, Sensitivities]
    speech: Mapping[str, Any] | None


def baseline_name(trained: Mapping[str, TrainedRow]) -> str:
    """What losses are measured against: the better of the two full-precision rows on validation."""
    return min(("full", "full-continued"), key=lambda name: trained[name].record["valid_nats"])


def average_seeds(runs: Sequence[Finished]) -> Finished:
    """One experiment of several runs that differ in the seed only: every token's log-probability averaged over the seeds.

    Sizes are the largest, times the mean. Allocations, sensitivities and words are those of the first run.
    """
    first = runs[0]
    evaluated = {}
    for name, item in first.evaluated.items():
        results = tuple(run.evaluated[name].result for run in runs)
        nll = np.mean([r.nll.astype(np.float64) for r in results], axis=0)
        mean = from_nll(nll, first.text.test, context=item.result.context, stride=item.result.stride)
        record = _average_record([run.evaluated[name].trained.record for run in runs])
        evaluated[name] = Evaluated(name, TrainedRow(item.trained.folder, record), mean, results)
    baseline = baseline_name({name: item.trained for name, item in evaluated.items()})
    return replace(first, evaluated=evaluated, baseline=baseline)


def _average_record(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first record with mean validation loss and time, and the largest size."""
    record = dict(records[0])
    for key, merge in (("valid_nats", statistics.fmean), ("train_seconds", statistics.fmean), ("bytes", max)):
        values = [r[key] for r in records if r.get(key) is not None]
        if key in record:
            record[key] = merge(values) if len(values) == len(records) else None
    return record


def equal_bytes(
    learned: str,
    sizes: Mapping[str, int],
    results: Mapping[str, Perplexity],
    uniform: Sequence[str],
    stream: TokenStream,
    by_seed: Mapping[str, Sequence[Perplexity]] | None = None,
) -> dict[str, Any]:
    """A learned row against the uniform curve at its own bytes: log-perplexity interpolated linearly in bytes.

    The difference is paired token by token with the same interpolation of the two neighbours' log-probabilities. ``by_seed``: each
    seed's own results, where there are several; ``delta_nats_seed_stderr`` is the standard error over them, and counts in the verdict.
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
    seeds = [[r.nats_per_token for r in (by_seed or {}).get(name, ())] for name in (learned, below, above)]
    over_seeds = _seed_stderr([ours - (1 - share) * b - share * a for ours, b, a in zip(*seeds, strict=True)])
    return {
        "name": learned,
        "interpolated_nats": reference.nats_per_token,
        "nats": results[learned].nats_per_token,
        "delta_nats": delta,
        "delta_nats_stderr": stderr,
        **({} if over_seeds is None else {"delta_nats_seed_stderr": over_seeds}),
        "neighbours": [below, above],
        "verdict": _verdict(delta, math.hypot(stderr, over_seeds or 0.0)),
    }


def _seed_stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean over seeds; unknown for one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


_READ_BY = {
    "straight-through": ("scales", "scale_learning_rate", "progressive"), "admm": ("admm",), "proximal": ("proximal",),
}  # fmt: skip


def trained_how(row: Row, base: QuantizeSettings) -> dict[str, Any]:
    """All that decides a row's training beside its bits: the settings that its method reads, and where it starts."""
    settings = row.settings(base).model_dump(mode="json")
    unread = {name for method, names in _READ_BY.items() if method != settings["method"] for name in names}
    return {name: value for name, value in settings.items() if name not in unread} | {"start": row.start}


def equal_bytes_rows(
    settings: ExperimentSettings,
    sizes: Mapping[str, int],
    results: Mapping[str, Perplexity],
    stream: TokenStream,
    by_seed: Mapping[str, Sequence[Perplexity]] | None = None,
) -> list[dict[str, Any]]:
    """Each learned row against the uniform rows trained as it was: method, length, scales, start and all other settings."""
    how = {row.name: trained_how(row, settings.quantize) for row in settings.rows}
    found = []
    for row in (r for r in settings.rows if r.ratio is not None):
        alike = [r.name for r in settings.rows if r.spec is not None and how[r.name] == how[row.name]]
        entry = equal_bytes(row.name, sizes, results, alike, stream, by_seed)
        if not alike:
            entry["verdict"] = f"no uniform row was trained as this one was ({_how_words(how[row.name])})"
        found.append(entry)
    return found


def _how_words(how: Mapping[str, Any]) -> str:
    scales = f", {how['scales']} scales" if "scales" in how else ""
    return f"{how['method']}{scales}, {how['train']['epochs']:g} epochs, from {how['start']}"


def _verdict(delta: float, stderr: float) -> str:
    change = f"{100 * np.expm1(delta):+.2f} % perplexity"
    if abs(delta) <= 2 * stderr:
        return (
            f"learned bits and uniform bits cannot be told apart at equal bytes ({change}, within two standard errors)"
        )
    word = "better" if delta < 0 else "not better"
    return f"learned bits are {word} than uniform bits at equal bytes ({change})"


def _row_json(
    item: Evaluated,
    baseline: Evaluated,
    inventory: ModelInventory,
    text: PreparedText,
    speech: Mapping[str, Any] | None,
) -> dict[str, Any]:
    record, result = item.trained.record, item.result
    size = int(record.get("bytes") or inventory.full_bytes)
    delta, stderr = paired_difference(result, baseline.result, text.test)
    row: dict[str, Any] = {
        "name": item.name,
        "bytes": size,
        "ratio": compression_ratio(inventory, size),
        "bits_per_weight": bits_per_weight(inventory, size),
        "ppl": result.ppl,
        "ppl_stderr": result.ppl_stderr,
        "wer": None,
        "p_value_vs_full": None,
        "valid_ppl": None if record["valid_nats"] is None else float(np.exp(record["valid_nats"])),
        "nats": result.nats_per_token,
        "delta_nats": delta,
        "delta_nats_stderr": stderr,
        "method": record.get("method"),
        "epochs": record.get("epochs"),
        "train_seconds": record.get("train_seconds"),
        **{key: record[key] for key in ("steps", "measure", "grid", "scales", "precision") if key in record},
    }
    if item.by_seed:
        deltas = [a.nats_per_token - b.nats_per_token for a, b in zip(item.by_seed, baseline.by_seed, strict=True)]
        row["ppl_by_seed"] = [r.ppl for r in item.by_seed]
        row["delta_nats_by_seed"] = deltas
        over_seeds = _seed_stderr(deltas)
        if over_seeds is not None:
            row["delta_nats_seed_stderr"] = over_seeds
    return row | dict((speech or {}).get("rows", {}).get(item.name, {}))


def summarize(settings: ExperimentSettings, found: Finished, command: str) -> dict[str, Any]:
    """Plain data for :func:`mixbits.summary.write_summary`. Differences are to the baseline."""
    text, inventory, evaluated, speech = found.text, found.inventory, found.evaluated, found.speech
    full, baseline = evaluated["full"], evaluated[found.baseline]
    rows = [_row_json(e, baseline, inventory, text, speech) for e in evaluated.values()]
    if speech is not None:  # systems without a neural language model come first, those mixed with an n-gram model last
        blank = {"bytes": None, "ratio": None, "bits_per_weight": None, "ppl": None, "ppl_stderr": None}
        others = [{"name": n, **blank, **entry} for n, entry in speech["rows"].items() if n not in evaluated]
        mixed = [row for row in others if row["name"].endswith(WITH_NGRAM)]
        rows = [row for row in others if row not in mixed] + rows + mixed
    sizes = {n: int(e.trained.record["bytes"]) for n, e in evaluated.items() if e.trained.record.get("bytes")}
    results = {n: e.result for n, e in evaluated.items()}
    by_seed = {n: e.by_seed for n, e in evaluated.items()}
    stored = (full.trained.model / "model.safetensors").stat().st_size
    main = settings.measure.measure if settings.measure.measure in found.measured else next(iter(found.measured), None)
    return {
        "format": "mixbits-summary",
        "format_version": 1,
        "title": settings.title,
        "seed": settings.seed,
        "seeds": list(settings.seeds or (settings.seed,)),
        "versions": versions(),
        "command": command,
        "data": {
            **text.hashes,
            "vocabulary": len(text.tokenizer),
            "unknown_share_test": text.test.num_unknown / text.test.num_words,
        },
        "baseline": found.baseline,
        "rows": rows,
        "equal_bytes": equal_bytes_rows(settings, sizes, results, text.test, by_seed),
        "allocations": {n: {u: str(s) for u, s in a.specs.items()} for n, a in found.allocations.items()},
        "unit_weights": {u.name: u.num_weights for u in inventory.units},
        "sensitivity": _sensitivity_json(found.measured[main]) if main else {},
        "measures": measure_facts(found.measured),
        "asr": {k: v for k, v in speech.items() if k != "rows"} if speech else {},
        "notes": [
            f"Full precision is counted as 4 bytes x {inventory.num_parameters:,} distinct parameters = {inventory.full_bytes:,} bytes; "
            f"its stored file has {stored:,}.",
            "Unknown words are predicted as one <unk> each.",
            f"Test perplexity: sliding window of {settings.model.context} tokens, stride {max(1, settings.model.context // 2)}, float32, "
            "models loaded back from disk; standard errors over sentences.",
            *_seed_notes(settings),
            *_bit_notes(found),
            *(speech or {}).get("notes", []),
        ],
        "settings": portable(settings.model_dump()),
        "training_logs": {n: e.trained.record.get("log", []) for n, e in evaluated.items()},
    }


def _seed_notes(settings: ExperimentSettings) -> list[str]:
    if len(settings.seeds) < 2:
        return []
    return [
        f"Means over the seeds {', '.join(map(str, settings.seeds))} (log-probabilities averaged token by token, sizes the largest); bits, "
        "sensitivities and words are those of the first. delta_nats_seed_stderr is the standard error over seeds; "
        "verdicts and the report's sentences take it and that over sentences in quadrature."
    ]


def _bit_notes(found: Finished) -> list[str]:
    """Warnings of the measuring, and what each learned row's budget left over and which units were counted as 0."""
    warnings = [f"{n}: {w}." for n, m in found.measured.items() for w in m.provenance.get("warnings", ())]
    solved = {n: a for n, a in found.allocations.items() if "next_larger" in a.provenance}
    return [*warnings, *(f"{n}: {note}." for n, a in solved.items() for note in allocation_notes(a))]


def measure_facts(measured: Mapping[str, Sensitivities]) -> dict[str, Any]:
    """Cost of each measure, its median relative error, and how well it ranks units and specs against losses measured before and after
    training.
    """
    facts: dict[str, Any] = {}
    for name, found in measured.items():
        errors = [
            unit.stderr[spec] / abs(value)
            for unit in found.units.values()
            for spec, value in unit.loss_increase.items()
            if value and math.isfinite(unit.stderr[spec])
        ]
        facts[name] = {
            "cost_forward_backwards": found.cost_forward_backwards,
            "median_relative_stderr": statistics.median(errors) if errors else None,
        }
        for truth, when in (("loss", "before_training"), ("prototypes", "after_training")):
            if truth in measured and truth != name:
                facts[name][f"rank_correlation_{when}"] = rank_agreement(found, measured[truth]).to_json()
    return facts


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
