"""Training: one subclass of transformers' Trainer, to which each quantization method is handed as an object.

The trainer knows nothing about quantization. A :class:`TrainingMethod` may change the weights the forward pass sees, add to the
gradients, and do something after the optimizer's step; plain training is the method that does nothing. Validation is the mean
loss of the model *as the method would deliver it* (projected on the grid), so that early stopping and the choice of the
best checkpoint are made on what is stored in the end.

Checkpoints: Trainer writes a checkpoint in place, so a marker file is written last, with the method's tensors beside it, and only
marked checkpoints are resumed from. A run that was killed gives the same result as one that was not.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import quiet_transformers
from mixbits.lm.corpus import BlockDataset, TokenStream
from mixbits.lm.loss import token_nll, training_loss

_MARKER = "mixbits_complete"
_METHOD_FILE = "mixbits_method.pt"


class TrainSettings(BaseModel):
    """How long and how fast to train. ``batch_size`` is blocks of ``context`` tokens per step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(10, gt=0)
    batch_size: int = Field(16, ge=1)
    context: int = Field(128, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    evals_per_epoch: int = Field(1, ge=1)
    patience: int | None = Field(None, ge=1)
    teacher_weight: float = Field(0.0, ge=0, le=1)
    seed: int = 0


class TrainingMethod(Protocol):
    """What a method object does around each step; see `mixbits.quant.methods` for the quantizing ones."""

    def parameters(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """Optimizer groups, or None for all of the model's parameters."""

    def before_forward(self, model: nn.Module) -> None:
        """May replace the weights the forward pass sees."""

    def after_backward(self, model: nn.Module) -> None:
        """May change gradients; must put the trained weights back."""

    def after_step(self, model: nn.Module, step: int, num_steps: int) -> dict[str, float]:
        """After the optimizer's step; returns figures to log (empty for none)."""

    def delivered(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it the model has the weights that would be stored."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors to keep beside a checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""


class LMTrainer(Trainer):
    """Trainer over blocks of tokens with an optional method and teacher."""

    def __init__(
        self, *args: Any, method: TrainingMethod | None, teacher: Any, teacher_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.teacher, self.teacher_weight = method, teacher, teacher_weight
        self.lm: Any = self.model
        self.loss_is_scaled_for_ga = False  # training_loss is a per-batch mean

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the method's groups, or Trainer's default."""
        groups = self.method.parameters(self.lm) if self.method else None
        if groups is None or self.optimizer is not None:
            return super().create_optimizer(model)
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.lm)
        self.optimizer = cls(groups, **options)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Chunked cross-entropy, with the teacher's distribution mixed in."""
        return training_loss(model, inputs["input_ids"], teacher=self.teacher, teacher_weight=self.teacher_weight)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward with the method's hooks around it; stops on a loss that is not finite."""
        if self.method:
            self.method.before_forward(self.lm)
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.method:
            self.method.after_backward(self.lm)
        if not bool(torch.isfinite(loss)):
            raise DataError(
                f"training loss is {float(loss)} at step {self.state.global_step + 1}; expected a finite value: "
                f"lower learning_rate (now {self.args.learning_rate:g}); the last good checkpoint is kept in {self.args.output_dir}"
            )
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean nats per token over the validation blocks, for the weights as they would be stored."""
        blocks = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(blocks, BlockDataset)
        was_training = self.lm.training
        self.lm.eval()
        total, count = 0.0, 0
        with self.method.delivered(self.lm) if self.method else nullcontext(), torch.no_grad():
            batch = max(1, self.args.per_device_eval_batch_size)
            for start in range(0, len(blocks), batch):
                rows = torch.stack([blocks[i]["input_ids"] for i in range(start, min(start + batch, len(blocks)))])
                with self.compute_loss_context_manager():
                    nll = token_nll(self.lm, rows.to(self.args.device))
                total, count = total + float(nll.double().sum()), count + nll.numel()
        self.lm.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        if self.method:
            torch.save(self.method.state_dict(), folder / _METHOD_FILE)
        (folder / _MARKER).write_text("complete\n")

    def load_method(self, checkpoint: str | Path | None) -> None:
        """Take the method's tensors from a checkpoint."""
        if self.method and checkpoint is not None:
            self.method.load_state_dict(torch.load(Path(checkpoint) / _METHOD_FILE, weights_only=True))


class _AfterStep(TrainerCallback):
    """Calls the method after each optimizer step and keeps its figures for the log."""

    def __init__(self, method: TrainingMethod, log: Callable[[dict[str, float]], None]) -> None:
        self.method, self.log = method, log

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        figures = self.method.after_step(model, state.global_step, state.max_steps)
        if figures:
            self.log(figures)


class _Progress(TrainerCallback):
    """Progress bar with speed and time left, training and validation loss beside it."""

    def __init__(self, title: str, tokens_per_step: int, *, show: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(), TextColumn("{task.fields[losses]}"), disable=not show,
        )  # fmt: skip
        self.title, self.tokens_per_step, self.losses = title, tokens_per_step, {"loss": math.nan, "valid": math.nan}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.start()
        self.task = self.bar.add_task(
            self.title, total=state.max_steps, completed=state.global_step, speed="", losses=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        speed = self.bar.tasks[0].speed
        text = f"{speed * self.tokens_per_step:,.0f} tokens/s" if speed else ""
        self.bar.update(self.task, completed=state.global_step, speed=text)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.losses["loss"] = logs.get("loss", self.losses["loss"])
        self.losses["valid"] = logs.get("eval_loss", self.losses["valid"])
        self.bar.update(self.task, losses=f"loss {self.losses['loss']:.3f} valid {self.losses['valid']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint whose marker was written, or None."""
    marked = [p.parent for p in Path(folder).glob(f"checkpoint-*/{_MARKER}")]
    return max(marked, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def _remove_unfinished(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / _MARKER).is_file():
            shutil.rmtree(checkpoint)


def _arguments(settings: TrainSettings, folder: Path, steps_per_epoch: int) -> TrainingArguments:
    eval_steps = max(1, math.ceil(steps_per_epoch / settings.evals_per_epoch))
    num_steps = max(1, round(settings.epochs * steps_per_epoch))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(1, 4096 // settings.context),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup_fraction * num_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
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

    ``folder`` receives checkpoints; with ``resume`` training goes on from the newest complete one. Returns {"valid_nats", "steps",
    "log"}. Raises DataError when the loss is not finite, the text is too short, or there are checkpoints and resume is not
    asked for; SpecError when a teacher's vocabulary differs.
    """
    _keep_freed_memory()
    folder = Path(folder)
    if teacher is not None:
        if teacher.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
            raise SpecError(
                "teacher and student have different vocabularies; distillation needs the same tokenizer for both"
            )
        teacher.eval().requires_grad_(False)
    checkpoint = last_complete_checkpoint(folder) if resume else None
    if not resume and any(folder.glob("checkpoint-*")):
        raise DataError(
            f"{folder}: holds checkpoints of an earlier run; resume it (--resume), or choose or clear the folder"
        )
    _remove_unfinished(folder)
    blocks, valid = BlockDataset(train_stream, settings.context), BlockDataset(valid_stream, settings.context)
    arguments = _arguments(settings, folder, math.ceil(len(blocks) / settings.batch_size))
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = LMTrainer(
            model=model, args=arguments, train_dataset=blocks, eval_dataset=valid,
            method=method, teacher=teacher, teacher_weight=settings.teacher_weight,
            callbacks=[_Progress(title, settings.batch_size * settings.context, show=show_progress)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if method is not None:
            trainer.add_callback(_AfterStep(method, trainer.log))
        if settings.patience:
            trainer.add_callback(EarlyStoppingCallback(settings.patience))
        trainer.load_method(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.load_method(trainer.state.best_model_checkpoint)
    best = trainer.state.best_metric
    if best is None:
        best = trainer.evaluate()["eval_loss"]
    return {"valid_nats": float(best), "steps": trainer.state.global_step, "log": trainer.state.log_history}


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks: by default every large activation is returned to the kernel and faulted in again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 30))  # M_MMAP_THRESHOLD
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int((1 << 31) - 1))  # M_TRIM_THRESHOLD
