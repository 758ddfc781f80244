"""Training any causal LM on a token stream, by one subclass of transformers' Trainer (`mixbits.lm.trainer`).

Checkpoints: Trainer writes a checkpoint in place, so a marker file is written last, with the method's tensors beside it, and only
marked checkpoints are resumed from. A run that was killed gives the same result as one that was not, and one that had finished
(by its number of steps or by early stopping) is not trained further. The global random generators are left as they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.lm.checkpoint import quiet_transformers
from mixbits.lm.corpus import BlockDataset, TokenStream
from mixbits.lm.progress import TrainingProgress
from mixbits.lm.train_settings import TrainSettings
from mixbits.lm.trainer import MARKER_FILE, AfterStep, LMTrainer, TrainingMethod

__all__ = ["TrainSettings", "TrainingMethod", "last_complete_checkpoint", "train_model"]

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint whose marker was written, or None."""
    marked = [p.parent for p in Path(folder).glob(f"checkpoint-*/{MARKER_FILE}")]
    return max(marked, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def _remove_unfinished(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / MARKER_FILE).is_file():
            shutil.rmtree(checkpoint)


def _finished_state(checkpoint: Path | None, num_steps: int) -> TrainerState | None:
    """The trainer state of a checkpoint after which nothing is left to train, else None."""
    if checkpoint is None:
        return None
    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{checkpoint}: checkpoint cannot be read ({error}); remove it to go on from an older one"
        ) from None
    stopped_early = control.get("should_training_stop", False) and state.global_step < state.max_steps
    return state if stopped_early or state.global_step >= num_steps else None


def _arguments(settings: TrainSettings, folder: Path, steps_per_epoch: int) -> TrainingArguments:
    eval_steps = max(1, math.ceil(steps_per_epoch / settings.evals_per_epoch))
    num_steps = max(1, round(settings.epochs * steps_per_epoch))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(1, 4096 // settings.context),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=round(settings.warmup_fraction * num_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, min(50, num_steps // 10)),
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=settings.seed,
        data_seed=settings.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # no DataParallel: the loss goes past the model's own forward
    return arguments


def _blocks(stream: TokenStream, context: int, name: str) -> BlockDataset:
    try:
        return BlockDataset(stream, context)
    except DataError as error:
        raise DataError(f"{name} {error}") from None


def _check(model: Any, teacher: Any, settings: TrainSettings) -> None:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and settings.context > limit:
        raise SpecError(f"context is {settings.context} tokens, the model's own at most {limit}; lower context")
    if teacher is not None and teacher.config.get_text_config().vocab_size != config.vocab_size:
        raise SpecError(
            f"teacher has {teacher.config.get_text_config().vocab_size} words, student {config.vocab_size}; "
            "distillation needs the same tokenizer for both"
        )


def train_model(
    model: Any,
    train_stream: TokenStream,
    valid_stream: TokenStream,
    settings: TrainSettings,
    folder: str | Path,
    *,
    method: TrainingMethod | None = None,
    teacher: Any = None,
    resume: bool = False,
    title: str = "training",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train ``model`` in place; afterwards it holds the weights (and the method the state) of the best validation loss.

    ``folder`` receives checkpoints; with ``resume`` training goes on from the newest complete one, and a finished run only
    gives back its best weights. Returns {"valid_nats", "steps", "log"}. Raises DataError when the loss is not finite, a text is
    too short, or there are checkpoints and resume is not asked for; SpecError when a teacher's vocabulary differs or
    ``settings.context`` is more than the model's.
    """
    _keep_freed_memory()
    folder = Path(folder)
    _check(model, teacher, settings)
    blocks = _blocks(train_stream, settings.context, "training")
    valid = _blocks(valid_stream, settings.context, "validation")
    if not resume and any(folder.glob("checkpoint-*")):
        raise DataError(
            f"{folder}: holds checkpoints of an earlier run; resume it (--resume), or choose or clear the folder"
        )
    checkpoint = last_complete_checkpoint(folder)
    _remove_unfinished(folder)
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    arguments = _arguments(settings, folder, math.ceil(len(blocks) / settings.batch_size))
    progress = TrainingProgress(title, settings.batch_size * settings.context, show=show_progress)
    callbacks: list[TrainerCallback] = [progress]
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    with _random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = LMTrainer(
            model=model, args=arguments, train_dataset=blocks, eval_dataset=valid, callbacks=callbacks, method=method,
            teacher=teacher, teacher_weight=settings.teacher_weight, precision=getattr(torch, settings.precision),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if method is not None:
            trainer.add_callback(AfterStep(method, trainer.log))
        try:
            _run(trainer, checkpoint, folder)
        finally:
            progress.stop()
    state = trainer.state
    assert state.best_metric is not None
    return {"valid_nats": float(state.best_metric), "steps": state.global_step, "log": state.log_history}


def _run(trainer: LMTrainer, checkpoint: Path | None, folder: Path) -> None:
    """Train from the checkpoint on, or not at all if it is of a finished run; then take the best weights."""
    finished = _finished_state(checkpoint, trainer.args.max_steps)
    if finished is None:
        trainer.load_method(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    else:
        trainer.state = finished
    trainer.load_best(folder)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Trainer seeds the global generators; put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks: by default every large activation is returned to the kernel and faulted in again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 30))  # M_MMAP_THRESHOLD
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int((1 << 31) - 1))  # M_TRIM_THRESHOLD
