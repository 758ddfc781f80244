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
from typing import Any, Literal

import numpy as np
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from mixbits.errors import DataError, FormatError, SpecError
from mixbits.lm.checkpoint import quiet_transformers
from mixbits.lm.corpus import BlockDataset, TokenStream
from mixbits.lm.precision import run_precision
from mixbits.lm.progress import TrainingProgress
from mixbits.lm.teacher_cache import IndexedBlocks, TeacherCache, can_cache
from mixbits.lm.train_settings import TrainSettings
from mixbits.lm.trainer import MARKER_FILE, AfterStep, LMTrainer, TrainingMethod, last_complete_checkpoint

__all__ = ["TrainSettings", "TrainingMethod", "last_complete_checkpoint", "train_model", "training_device"]

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


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
        logging_first_step=True,  # what guards hold later losses against
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
    if teacher is None:
        if settings.hidden_weight:
            raise SpecError(
                f"hidden_weight is {settings.hidden_weight:g} and there is no teacher; give one, or set it to 0"
            )
        return
    other = teacher.config.get_text_config()
    if other.vocab_size != config.vocab_size:
        raise SpecError(
            f"teacher has {other.vocab_size} words, student {config.vocab_size}; "
            "distillation needs the same tokenizer for both"
        )
    depths, widths = (other.num_hidden_layers, config.num_hidden_layers), (other.hidden_size, config.hidden_size)
    if settings.hidden_weight and widths[0] != widths[1]:
        raise SpecError(
            f"teacher has hidden size {widths[0]}, student {widths[1]}; hidden_weight needs the same for both"
        )
    if settings.hidden_weight and settings.hidden_layers == "all" and depths[0] != depths[1]:
        raise SpecError(
            f"teacher has {depths[0]} layers, student {depths[1]}; hidden_layers all needs the same for both; set it to last"
        )


def _teacher_cache(teacher: Any, settings: TrainSettings, num_blocks: int, precision: str) -> TeacherCache | None:
    """A cache where it pays (two epochs on) and the teacher's last hidden state is all that is asked for."""
    last_only = settings.hidden_weight == 0 or settings.hidden_layers == "last"
    if teacher is None or not settings.needs_teacher or not last_only or settings.epochs < 2:
        return None
    if settings.teacher_cache_mib == 0 or not can_cache(teacher):
        return None
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float16
    limit = settings.teacher_cache_mib << 20
    return TeacherCache(teacher, num_blocks, settings.context, limit_bytes=limit, dtype=dtype)


def training_device() -> Literal["cuda", "cpu"]:
    """Where training runs. A method that keeps tensors beside the model's is built after the model was moved there."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    gives back its best weights. Returns {"valid_nats", "steps", "log", "precision"}. Raises DataError when loss or gradients are not
    finite or explode (`mixbits.lm.guards`), a text is too short, or there are checkpoints and resume is not asked for or asks for
    another precision; SpecError when a teacher's vocabulary or shape differs or ``settings.context`` is more than the model's.
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
    device = training_device()
    if teacher is not None:
        teacher.eval().requires_grad_(False).to(device)
    precision = run_precision(settings.precision, device, folder, started=checkpoint is not None)
    arguments = _arguments(settings, folder, math.ceil(len(blocks) / settings.batch_size))
    progress = TrainingProgress(title, settings.batch_size * settings.context, show=show_progress)
    callbacks: list[TrainerCallback] = [progress]
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    with _random_state_kept(), quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = _teacher_cache(teacher, settings, len(blocks), precision)
        trainer = LMTrainer(
            model=model, args=arguments, train_dataset=blocks if cache is None else IndexedBlocks(blocks),
            eval_dataset=valid, callbacks=callbacks, method=method, teacher=teacher, cache=cache,
            settings=settings, precision=getattr(torch, precision),
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
    return {
        "valid_nats": float(state.best_metric),
        "steps": state.global_step,
        "log": state.log_history,
        "precision": precision,
    }


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
