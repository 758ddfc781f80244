"""What earlier utterances as context are worth: word errors on LibriSpeech test-clean with each kind of history, weights tuned on dev-clean for each apart.

none: every utterance by itself. first-pass: the recognizer's texts of the utterances before it in the same chapter. rescored: their one-bests after
rescoring. reference: what was said, a bound and no system. Significance against none: MAPSSWE, two-sided.

    python benchmarks/bench_history.py --model DIRECTORY [--output results/history.json]

The model has to know LibriSpeech's words in upper case (recipes/librispeech-small.yaml makes one).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, get_args

from mixbits.asr.formats.registry import read_any
from mixbits.asr.nbest import one_best_texts, reference_texts
from mixbits.asr.significance import mapsswe
from mixbits.asr.wer import sum_errors
from mixbits.pipeline.history import History
from mixbits.pipeline.rescore import MODEL, ScoreSettings, rescore_list
from mixbits.runs import versions, write_json


def measure(model: Path, history: Any, tokens: int, dev: Path, test: Path) -> tuple[list[str], dict[str, Any]]:
    """One-bests of the test list and what is recorded of them."""
    settings = ScoreSettings(history=history, max_history_tokens=tokens)
    done = rescore_list(test, model, dev=dev, settings=settings)
    weights = done.weights[MODEL]
    row = {"model_hash": weights.model_hash, "model_positions": done.lm.num_nodes, "dev_errors": weights.dev_errors}
    return one_best_texts(done.lists), row


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--history-tokens", type=int, default=64)
    parser.add_argument("--test", default="test_clean", help="list to report on (test_clean, dev_other)")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if "MIXBITS_DATA" not in os.environ:
        raise SystemExit("MIXBITS_DATA is not set; expected the folder with the lists")
    folder = Path(os.environ["MIXBITS_DATA"]) / "librispeech_10best"
    dev, test = folder / "dev_clean.jsonl.gz", folder / f"{options.test}.jsonl.gz"
    lists = read_any(test)
    references = reference_texts(lists)
    found: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    for history in get_args(History):
        texts[history], row = measure(options.model, history, options.history_tokens, dev, test)
        model_hash = row.pop("model_hash")
        errors = sum_errors(references, texts[history])
        row |= {"wer": errors.wer, "errors": errors.num_errors}
        if history != "none":
            row["p_value_vs_none"] = mapsswe(references, texts["none"], texts[history]).p
            row["positions_over_none"] = row["model_positions"] / found["none"]["model_positions"]
        found[history] = row
        print(history, row, file=sys.stderr, flush=True)
    write = {
        "benchmark": "earlier utterances as context", "test": options.test, "history_tokens": options.history_tokens,
        "model_hash": model_hash, "data_hash": lists.data_hash, "histories": found,
        "versions": versions(),
    }  # fmt: skip
    if options.output is not None:
        write_json(options.output, write)


if __name__ == "__main__":
    main()
