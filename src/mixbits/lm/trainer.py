"""The one Trainer subclass, and the interface of the method objects that quantize while it trains.

The trainer knows nothing about quantization. A :class:`TrainingMethod` may change the weights the forward pass sees, add to the
gradients, and do something after the optimizer's step; plain training is the method that does nothing. Validation is the mean
loss of the model *as the method would deliver it* (projected on the grid), so that early stopping and the choice of the
best checkpoint are made on what is stored in the end.

Autocast is entered here, around the loss: transformers' own bfloat16 option wraps ``model.forward`` for good, which the chunked
loss goes past and which would leave a trained model in bfloat16 ever after. Limit: one process, at most one GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from mixbits.errors import DataError
from mixbits.lm.corpus import BlockDataset
from mixbits.lm.guards import (
    describe_forward,
    describe_gradients,
    describe_largest,
    exploded_training,
    exploded_validation,
    first_bad_parameter,
    validation_limit,
)
from mixbits.lm.loss import evaluation_mode, token_nll, training_loss
from mixbits.lm.teacher_cache import TeacherCache
from mixbits.lm.train_settings import TrainSettings

MARKER_FILE = "mixbits_complete"
METHOD_FILE = "mixbits_method.pt"


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint whose marker was written, or None."""
    marked = [p.parent for p in Path(folder).glob(f"checkpoint-*/{MARKER_FILE}")]
    return max(marked, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


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


@runtime_checkable
class ExtraParameters(Protocol):
    """A method that trains tensors of its own, or some of the model's in another way, beside the default groups."""

    def extra_parameters(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups: "params", optional "lr" (peak; the schedule scales it) and "weight_decay"; they leave other groups."""


@runtime_checkable
class SecondGradient(Protocol):
    """A method that may want the gradient of the same batch at other weights too (ADMM's extra-gradient)."""

    def second_gradient(self, model: nn.Module) -> bool:
        """Asked after ``after_backward``: True when it holds the first gradient, cleared it, and moved the weights.

        Then the step runs forward and backward once more and calls ``after_backward`` again, which must put the weights back.
        """


@runtime_checkable
class StopsTraining(Protocol):
    """A method that knows when it has converged."""

    def should_stop(self) -> bool:
        """Asked after each ``after_step``: True ends the training after one more validation and checkpoint."""


class LMTrainer(Trainer):
    """Trainer over blocks of tokens with an optional method and teacher, in ``precision`` (autocast) on float32 weights."""

    def __init__(
        self,
        *args: Any,
        method: TrainingMethod | None,
        teacher: Any,
        settings: TrainSettings,
        precision: torch.dtype,
        cache: TeacherCache | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method, self.teacher, self.settings = method, teacher, settings
        self.precision, self.cache = precision, cache
        self.lm: Any = self.model
        self._last_ids: torch.Tensor | None = None
        self.loss_is_scaled_for_ga = False  # training_loss is a per-batch mean

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the method's groups (or Trainer's default: no decay on biases and norms) and its extra ones."""
        if self.optimizer is not None:
            return self.optimizer
        groups = self.method.parameters(self.lm) if self.method else None
        if groups is None:
            groups = self._default_groups()
        if isinstance(self.method, ExtraParameters):
            extra = self.method.extra_parameters(self.lm)
            taken = {id(p) for group in extra for p in group["params"]}
            groups = [
                {**group, "params": [p for p in group["params"] if id(p) not in taken]} for group in groups
            ] + extra
        cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.lm)
        self.optimizer = cls(groups, **{"weight_decay": self.args.weight_decay, **options})
        return self.optimizer

    def _default_groups(self) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(self.lm))
        named = [(n in decayed, p) for n, p in self.lm.named_parameters() if p.requires_grad]
        return [
            {"params": [p for decay, p in named if decay], "weight_decay": self.args.weight_decay},
            {"params": [p for decay, p in named if not decay], "weight_decay": 0.0},
        ]

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters the optimizer steps: the model's in its own order, then those that only the method owns."""
        assert self.optimizer is not None
        stepped = {id(p): p for group in self.optimizer.param_groups for p in group["params"]}
        named = [(name, stepped.pop(id(p))) for name, p in self.lm.named_parameters() if id(p) in stepped]
        return named + [(f"the method's parameter {i} {tuple(p.shape)}", p) for i, p in enumerate(stepped.values())]

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip the norm over everything the optimizer steps; returns the norm before."""
        named = self.trained_parameters()
        gradients = [p.grad for _, p in named if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            where = describe_gradients(named)
            raise self._stopped(f"gradient norm is {float(norm)} at step {self.state.global_step + 1}", where)
        nn.utils.clip_grads_with_norm_([p for _, p in named], self.args.max_grad_norm, norm)
        return norm

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast for the forward pass."""
        stack = contextlib.ExitStack()
        if self.precision != torch.float32:
            stack.enter_context(torch.autocast(self.args.device.type, self.precision))
        return stack

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Chunked cross-entropy, with the teacher's distribution and hidden states mixed in."""
        ids, settings, known = inputs["input_ids"], self.settings, None
        if self.cache is not None:
            known = self.cache.states(inputs["index"], ids[:, :-1])
        with evaluation_mode(model) if settings.dropout == "off" else nullcontext():
            return training_loss(
                model, ids, teacher=self.teacher, teacher_weight=settings.teacher_weight,
                temperature=settings.teacher_temperature, hidden_weight=settings.hidden_weight,
                hidden_layers=settings.hidden_layers, teacher_hidden=known,
            )  # fmt: skip

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward with the method's hooks around it; stops on a loss that is not finite."""
        for _, parameter in self.trained_parameters():
            parameter.grad = None  # Trainer clears the model's own ones only
        if self.method:
            self.method.before_forward(self.lm)
        loss = self._forward_backward(model, inputs, *args, **kwargs)
        if self.method:
            self.method.after_backward(self.lm)
            if isinstance(self.method, SecondGradient) and self.method.second_gradient(self.lm):
                self._forward_backward(model, inputs, *args, **kwargs)
                self.method.after_backward(self.lm)
        return loss

    def _forward_backward(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's step; the weights that gave a bad loss are still in place when the layer is looked for."""
        self._last_ids = inputs["input_ids"]
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_finite("training", float(loss), self.state.global_step + 1, inputs["input_ids"])
        return loss

    def _check_finite(self, kind: str, loss: float, step: int, input_ids: torch.Tensor) -> None:
        if not math.isfinite(loss):
            with self.compute_loss_context_manager():
                where = describe_forward(self.lm, input_ids[:, :-1].to(self.args.device))
            raise self._stopped(f"{kind} loss is {loss} at step {step}", where)

    def _stopped(self, what: str, where: str = "", *, exploded: bool = False) -> DataError:
        """The error that ends a run gone wrong: what, where, which checkpoint is good, what to do.

        The newest checkpoint is good if the loss became infinite of a sudden; where it ``exploded``, the best one, if it
        was ever low.
        """
        newest, kept = last_complete_checkpoint(self.args.output_dir or "."), "no checkpoint was written yet"
        best, metric = self.state.best_global_step, self.state.best_metric
        if newest is not None and metric is not None and exploded:
            limit = validation_limit(self.lm.config.get_text_config().vocab_size)
            kept = f"no checkpoint is a good one (best: {metric:.4g} nats per token)"
            if metric <= limit:
                kept = f"the last good checkpoint is kept: {newest.with_name(f'checkpoint-{best}')} ({metric:.4g} nats per token)"
        elif newest is not None:
            kept = f"the last good checkpoint is kept: {newest}"
            if metric is not None:
                kept += f" (best: checkpoint-{best}, {metric:.4g} nats per token)"
        return DataError(
            f"{what}{where}; expected a finite and falling value: train again with a lower learning_rate "
            f"(now {self.args.learning_rate:g}); {kept}"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log; stops when the losses in it have exploded."""
        super().log(logs, *args, **kwargs)
        history, vocabulary = self.state.log_history, self.lm.config.get_text_config().vocab_size
        problem = None
        if "loss" in logs:
            problem = exploded_training([e["loss"] for e in history if "loss" in e], vocabulary)
        elif "eval_loss" in logs:
            # what a method delivers may be poor for a while, between what it trains and its grid
            losses, patience = [e["eval_loss"] for e in history if "eval_loss" in e], 2 if self.method else 1
            problem = exploded_validation(losses, vocabulary, patience=patience)
        if problem is not None:
            raise self._stopped(f"{problem} at step {self.state.global_step}", self._largest_output(), exploded=True)

    def _largest_output(self) -> str:
        if self._last_ids is None:
            return ""
        with self.compute_loss_context_manager():
            return describe_largest(self.lm, self._last_ids[:, :-1].to(self.args.device))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean nats per token over the validation blocks, for the weights as they would be stored."""
        blocks = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(blocks, BlockDataset)
        total, count = 0.0, 0
        delivered = self.method.delivered(self.lm) if self.method else nullcontext()
        with delivered, evaluation_mode(self.lm), torch.no_grad(), self.compute_loss_context_manager():
            batch = max(1, self.args.per_device_eval_batch_size)
            for start in range(0, len(blocks), batch):
                rows = torch.stack([blocks[i]["input_ids"] for i in range(start, min(start + batch, len(blocks)))])
                nll = token_nll(self.lm, rows.to(self.args.device))
                total, count = total + float(nll.double().sum()), count + nll.numel()
                self._check_finite("validation", total / count, self.state.global_step, rows)
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        bad = first_bad_parameter(self.trained_parameters())
        if bad is not None:
            raise self._stopped(f"{bad} is not finite at step {self.state.global_step}")
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        if self.method:
            torch.save(self.method.state_dict(), folder / METHOD_FILE)
        (folder / MARKER_FILE).write_text("complete\n")

    def load_method(self, checkpoint: str | Path | None) -> None:
        """Take the method's tensors from a checkpoint."""
        if self.method and checkpoint is not None:
            self.method.load_state_dict(torch.load(Path(checkpoint) / METHOD_FILE, weights_only=True))

    def load_best(self, folder: Path) -> None:
        """Load weights and method of the best checkpoint in ``folder`` by ``self.state``. Raises DataError when it is gone."""
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if not (best / MARKER_FILE).is_file():
            raise DataError(
                f"{best}: the best checkpoint of this finished run is missing; remove {folder} and train again"
            )
        self.state.best_model_checkpoint = str(best)
        self._load_best_model()
        self.load_method(best)


class AfterStep(TrainerCallback):
    """Calls the method after each optimizer step and keeps its figures for the log."""

    def __init__(self, method: TrainingMethod, log: Callable[[dict[str, float]], None]) -> None:
        self.method, self.log = method, log

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        figures = self.method.after_step(model, state.global_step, state.max_steps)
        if figures:
            self.log(figures)
        if isinstance(self.method, StopsTraining) and self.method.should_stop():
            control.should_training_stop = control.should_evaluate = control.should_save = True
