"""What an experiment found, as the data of ``summary.json``: rows, learned bits against uniform ones at equal bytes, logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixbits.lm.corpus import TokenStream
from mixbits.lm.perplexity import Perplexity, from_nll, paired_difference
from mixbits.pipeline.prepare import PreparedText
from mixbits.pipeline.rows import TrainedRow
from mixbits.pipeline.settings import ExperimentSettings, portable
from mixbits.quant.sensitivity import Sensitivities
from mixbits.runs import versions
from mixbits.spec import BitAllocation, ModelInventory, bits_per_weight, compression_ratio


@dataclass(frozen=True)
class Evaluated:
    """A trained row with its test perplexity."""

    name: str
    trained: TrainedRow
    result: Perplexity


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


def _equal_bytes_rows(
    settings: ExperimentSettings, sizes: Mapping[str, int], results: Mapping[str, Perplexity], stream: TokenStream
) -> list[dict[str, Any]]:
    """Each learned row against uniform rows of its own method; if those do not reach around it, against the default method's."""
    default = settings.quantize.method
    found = []
    for row in (r for r in settings.rows if r.ratio is not None):
        own = row.method or default
        for method in (own, default):
            uniform = [r.name for r in settings.rows if r.spec is not None and (r.method or default) == method]
            entry = equal_bytes(row.name, sizes, results, uniform, stream)
            if entry["neighbours"]:
                break
        if entry["neighbours"] and method != own:
            entry["verdict"] += f"; this row was trained with {own}, the uniform ones with {method}"
        found.append(entry)
    return found


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
    row = {
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
    }
    return row | dict((speech or {}).get("rows", {}).get(item.name, {}))


def summarize(
    settings: ExperimentSettings,
    text: PreparedText,
    inventory: ModelInventory,
    evaluated: Mapping[str, Evaluated],
    baseline_name: str,
    allocations: Mapping[str, BitAllocation],
    sensitivities: Sensitivities,
    speech: Mapping[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """Plain data for :func:`mixbits.summary.write_summary`. Differences are to the row ``baseline_name``."""
    full, baseline = evaluated["full"], evaluated[baseline_name]
    rows = [_row_json(e, baseline, inventory, text, speech) for e in evaluated.values()]
    if speech is not None:  # systems without a language model of ours come first
        blank = {"bytes": None, "ratio": None, "bits_per_weight": None, "ppl": None, "ppl_stderr": None}
        rows = [{"name": n, **blank, **entry} for n, entry in speech["rows"].items() if n not in evaluated] + rows
    sizes = {n: int(e.trained.record["bytes"]) for n, e in evaluated.items() if e.trained.record.get("bytes")}
    results = {n: e.result for n, e in evaluated.items()}
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
        "equal_bytes": _equal_bytes_rows(settings, sizes, results, text.test),
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
            *(speech or {}).get("notes", []),
        ],
        "settings": portable(settings.model_dump()),
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
