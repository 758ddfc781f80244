"""The full-precision rows of an experiment: ``full``, and ``full-continued`` trained on as long as the quantized ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixbits.lm.checkpoint import load_model, model_hash, save_model
from mixbits.lm.presets import build_model
from mixbits.lm.train import train_model
from mixbits.pipeline.prepare import PreparedText
from mixbits.pipeline.rows import TrainedRow, fingerprint, run_row
from mixbits.pipeline.settings import ExperimentSettings


def _steps_log(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation losses and a method's figures from Trainer's log, without the running training losses."""
    return [{k: v for k, v in entry.items() if k != "epoch"} for entry in log if "loss" not in entry]


def train_full(
    settings: ExperimentSettings, text: PreparedText, folder: Path, *, show_progress: bool = True
) -> TrainedRow:
    """Train the full-precision model from scratch (or find it finished)."""
    key = fingerprint("full", settings.model.model_dump(), settings.full.model_dump(), text.hashes, settings.seed)

    def work(train_folder: Path, model_folder: Path) -> dict[str, Any]:
        model = build_model(settings.model, text.tokenizer, seed=settings.seed)
        found = train_model(
            model,
            text.train,
            text.valid,
            settings.full,
            train_folder,
            resume=True,
            title="full",
            show_progress=show_progress,
        )
        save_model(model.eval(), text.tokenizer, model_folder)
        return {
            "valid_nats": found["valid_nats"],
            "steps": found["steps"],
            "epochs": settings.full.epochs,
            "log": _steps_log(found["log"]),
        }

    return run_row(folder, key, work)


def train_continued(
    settings: ExperimentSettings, text: PreparedText, full: TrainedRow, folder: Path, *, show_progress: bool = True
) -> TrainedRow:
    """Train the full-precision model on with the quantized models' epochs, learning rate and teacher."""
    more = settings.quantize.train
    key = fingerprint("continued", more.model_dump(), model_hash(full.model), text.hashes)

    def work(train_folder: Path, model_folder: Path) -> dict[str, Any]:
        model, _ = load_model(full.model)
        teacher = load_model(full.model)[0] if more.teacher_weight else None
        found = train_model(
            model, text.train, text.valid, more, train_folder,
            teacher=teacher, resume=True, title="full-continued", show_progress=show_progress,
        )  # fmt: skip
        save_model(model.eval(), text.tokenizer, model_folder)
        return {
            "valid_nats": found["valid_nats"],
            "steps": found["steps"],
            "epochs": more.epochs,
            "log": _steps_log(found["log"]),
        }

    return run_row(folder, key, work)
