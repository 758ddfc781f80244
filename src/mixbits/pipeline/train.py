"""Training full-precision models: from a text file, and the rows ``full`` and ``full-continued`` of an experiment."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from mixbits.errors import DataError
from mixbits.lm.checkpoint import load_model, model_hash, save_model
from mixbits.lm.corpus import read_sentences
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import load_tokenizer, word_tokenizer
from mixbits.lm.train import TrainSettings, train_model
from mixbits.pipeline.prepare import PreparedText, split_text
from mixbits.pipeline.rows import TrainedRow, fingerprint, run_row
from mixbits.pipeline.settings import ExperimentSettings, Vocabulary


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


def train_from_text(
    text: str | Path,
    output: str | Path,
    *,
    size: ModelSize,
    settings: TrainSettings,
    vocabulary: Vocabulary,
    valid: str | Path | None = None,
    resume: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train a model from scratch on a text file and write the model directory ``output``.

    Checkpoints lie in ``<output>.work`` until it is done. Returns {"valid_nats", "valid_ppl", "num_parameters", "steps"}.
    Raises DataError when ``output`` is there already.
    """
    output = Path(output)
    if output.exists():
        raise DataError(f"{output}: exists already; choose another output folder or remove it")
    if vocabulary.path is not None:
        tokenizer = load_tokenizer(vocabulary.path)
    else:
        tokenizer = word_tokenizer(
            read_sentences(text),
            max_words=vocabulary.max_words,
            min_count=vocabulary.min_count,
            max_length=size.context,
        )
    train, held_out = split_text(tokenizer, text, valid)
    model = build_model(size, tokenizer, seed=settings.seed)
    work = output.with_name(output.name + ".work")
    found = train_model(
        model, train, held_out, settings, work, resume=resume, title="training", show_progress=show_progress
    )
    save_model(model.eval(), tokenizer, output)
    shutil.rmtree(work, ignore_errors=True)
    return {
        "valid_nats": found["valid_nats"],
        "valid_ppl": math.exp(found["valid_nats"]),
        "num_parameters": model.num_parameters(),
        "steps": found["steps"],
    }
