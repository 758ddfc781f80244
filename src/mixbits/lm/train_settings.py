"""Settings of a training run, apart from the trainer so that recipes are checked without importing transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainSettings(BaseModel):
    """How long and how fast to train. ``batch_size`` is blocks of ``context`` tokens per step.

    ``warmup_fraction`` of the steps raises the learning rate, whatever the schedule after it. ``patience``: stop after that
    many validations without gain. ``precision``: "auto" is bfloat16 where the machine is fast at it, else float32. ``dropout``: as
    the model was built, or "off", which suits a quantized student that learns from a teacher.

    Distillation, with a teacher: ``teacher_weight`` is the share of its distributions' loss, taken at ``teacher_temperature``;
    ``hidden_weight`` adds that much squared error of the ``hidden_layers``' states. ``teacher_cache_mib`` bounds the memory that
    keeps the teacher's states of each block from one epoch to the next (0: none).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: float = Field(10, gt=0, le=1e6)
    batch_size: int = Field(16, ge=1)
    context: int = Field(128, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    evals_per_epoch: int = Field(1, ge=1)
    patience: int | None = Field(None, ge=1)
    teacher_weight: float = Field(0.0, ge=0, le=1)
    teacher_temperature: float = Field(1.0, gt=0, le=100)
    hidden_weight: float = Field(0.0, ge=0)
    hidden_layers: Literal["last", "all"] = "last"
    teacher_cache_mib: int = Field(1024, ge=0)
    dropout: Literal["model", "off"] = "model"
    seed: int = Field(0, ge=0, lt=2**32)

    @property
    def needs_teacher(self) -> bool:
        """True when some of the loss comes from a teacher."""
        return self.teacher_weight > 0 or self.hidden_weight > 0
