"""Training full-precision models: from a text file, and the rows ``full`` and ``full-continued`` of an experiment."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from mixbits.errors import DataError
from mixbits.lm.checkpoint import load_model, model_hash, save_model
from mixbits.lm.corpus import encode
from mixbits.lm.presets import ModelSize, build_model
from mixbits.lm.tokenizer import load_tokenizer, word_tokenizer
from mixbits.lm.train import TrainSettings, last_complete_checkpoint, train_model
from mixbits.pipeline.checks import check_learned, check_text
from mixbits.pipeline.prepare import PreparedText, split_sentences
from mixbits.pipeline.rows import TrainedRow, figures_log, fingerprint, run_row
from mixbits.pipeline.settings import ExperimentSettings, Vocabulary
from mixbits.pipeline.workplace import locked, work_folder
from mixbits.runs import read_json, write_json


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
        check_learned(found["valid_nats"], text.train, text.valid, folder)
        save_model(model.eval(), text.tokenizer, model_folder)
        return {
            "valid_nats": found["valid_nats"],
            "steps": found["steps"],
            "epochs": settings.full.epochs,
            "precision": found["precision"],
            "log": figures_log(found["log"]),
        }

    return run_row(folder, key, work)


def train_continued(
    settings: ExperimentSettings, text: PreparedText, full: TrainedRow, folder: Path, *, show_progress: bool = True
) -> TrainedRow:
    """Train the full-precision model on with the quantized models' epochs (refinement included), learning rate and teacher.

    It keeps its dropout, whatever theirs: without, it would learn nothing from a teacher that it is equal to.
    """
    more = settings.quantize.train
    more = more.model_copy(update={"epochs": more.epochs + settings.quantize.refine_epochs, "dropout": "model"})
    key = fingerprint("continued", more.model_dump(), model_hash(full.model), text.hashes)

    def work(train_folder: Path, model_folder: Path) -> dict[str, Any]:
        model, _ = load_model(full.model)
        teacher = load_model(full.model)[0] if more.needs_teacher else None
        found = train_model(
            model, text.train, text.valid, more, train_folder,
            teacher=teacher, resume=True, title="full-continued", show_progress=show_progress,
        )  # fmt: skip
        save_model(model.eval(), text.tokenizer, model_folder)
        return {
            "valid_nats": found["valid_nats"],
            "steps": found["steps"],
            "epochs": more.epochs,
            "precision": found["precision"],
            "log": figures_log(found["log"]),
        }

    return run_row(folder, key, work)


def _claim(work: Path, key: str, *, resume: bool) -> None:
    """Note what the work folder is for. Raises DataError when it holds checkpoints of something else."""
    started = work / "started.json"
    if any(work.glob("checkpoint-*")):
        if not resume:
            raise DataError(f"{work}: holds checkpoints of an earlier run; go on with --resume, or remove the folder")
        if not started.is_file() or read_json(started).get("fingerprint") != key:
            raise DataError(
                f"{work}: holds checkpoints of other settings or another text; resume with the same ones, or remove the folder"
            )
    write_json(started, {"fingerprint": key})


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

    A word-level vocabulary is that of the training sentences (held-out ones aside). Checkpoints lie in ``<output>.work`` until it
    is done. Returns {"valid_nats", "valid_ppl", "num_parameters", "steps"}. Raises DataError when ``output`` is there already, or
    its work folder is of other settings or another text, or another process is at work in it.
    """
    output = Path(output)
    if output.exists():
        raise DataError(f"{output}: exists already; choose another output folder or remove it")
    sentences, held_out_sentences = split_sentences(text, valid)
    if vocabulary.path is not None:
        tokenizer = load_tokenizer(vocabulary.path)
    else:
        tokenizer = word_tokenizer(
            sentences, max_words=vocabulary.max_words, min_count=vocabulary.min_count, max_length=size.context
        )
    train, held_out = encode(tokenizer, sentences), encode(tokenizer, held_out_sentences)
    check_text(held_out, 1, valid or f"{text} (held-out part)")
    model = build_model(size, tokenizer, seed=settings.seed)
    work = work_folder(output)
    key = fingerprint(
        "train", size.model_dump(), settings.model_dump(), tokenizer.get_vocab(), train.sha256, held_out.sha256
    )
    with locked(work):
        _claim(work, key, resume=resume)
        try:
            found = train_model(
                model, train, held_out, settings, work, resume=resume, title="training", show_progress=show_progress
            )
        except BaseException:
            if last_complete_checkpoint(work) is None:
                shutil.rmtree(work, ignore_errors=True)
            raise
        check_learned(found["valid_nats"], train, held_out, output)
        save_model(model.eval(), tokenizer, output)
        shutil.rmtree(work, ignore_errors=True)
    return {
        "valid_nats": found["valid_nats"],
        "valid_ppl": math.exp(min(found["valid_nats"], 700.0)),
        "num_parameters": model.num_parameters(),
        "steps": found["steps"],
    }
