"""Training the models of an experiment, each in a folder of its own that can be resumed and is never trained twice.

``<row>/model`` is the finished model directory, ``<row>/row.json`` its settings and what training found, written last;
``<row>/train`` holds checkpoints while training runs and is removed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixbits.errors import DataError
from mixbits.runs import read_json, write_json

ROW_FILE = "row.json"


@dataclass(frozen=True)
class TrainedRow:
    """A finished row: where its model is, and what was recorded while training it."""

    folder: Path
    record: dict[str, Any]

    @property
    def model(self) -> Path:
        """The model directory."""
        return self.folder / "model"


def fingerprint(*parts: Any) -> str:
    """Hash of settings and hashes that decide a row's result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def finished_row(folder: Path, key: str) -> TrainedRow | None:
    """The row if it is complete; DataError if the folder holds one made with other settings."""
    if not (folder / ROW_FILE).is_file():
        return None
    record = read_json(folder / ROW_FILE)
    if record.get("fingerprint") != key:
        raise DataError(
            f"{folder}: holds a model made with other settings or data; choose another output folder or remove this one"
        )
    return TrainedRow(folder, record)


def run_row(folder: Path, key: str, work: Callable[[Path, Path], dict[str, Any]]) -> TrainedRow:
    """Run ``work(train folder, model folder)`` unless the row is complete, and record what it returns and its seconds.

    An interrupted row leaves its checkpoints in ``train`` and ``work`` resumes from them; what an interrupted row of other
    settings left is never touched: DataError. The seconds of a resumed row are unknown (null), because only its last part was timed.
    """
    done = finished_row(folder, key)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    started_file = folder / "started.json"
    resumed = started_file.is_file()
    if resumed and read_json(started_file).get("fingerprint") != key:
        raise DataError(
            f"{folder}: holds an unfinished model with other settings or data; choose another output folder or remove this one"
        )
    if not resumed:
        shutil.rmtree(folder / "train", ignore_errors=True)
        write_json(started_file, {"fingerprint": key})
    start = time.monotonic()
    record = work(folder / "train", folder / "model")
    seconds = None if resumed else round(time.monotonic() - start, 1)
    record = {"fingerprint": key, **record, "train_seconds": seconds}
    write_json(folder / ROW_FILE, record)
    shutil.rmtree(folder / "train", ignore_errors=True)
    started_file.unlink(missing_ok=True)
    return TrainedRow(folder, record)


def figures_log(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation losses and a method's figures from Trainer's log, without the running training losses."""
    return [{k: v for k, v in entry.items() if k != "epoch"} for entry in log if "loss" not in entry]
