"""Settings of a training run, apart from the trainer so that recipes are checked without importing transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainSettings(BaseModel):
    """How long and how fast to train. ``batch_size`` is blocks of ``context`` tokens per step.

    ``warmup_fraction`` of the steps raises the learning rate, whatever the schedule after it. ``patience``: stop after that
    many validations without gain. ``teacher_weight``: share of the distillation loss.
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
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    evals_per_epoch: int = Field(1, ge=1)
    patience: int | None = Field(None, ge=1)
    teacher_weight: float = Field(0.0, ge=0, le=1)
    seed: int = Field(0, ge=0, lt=2**32)
