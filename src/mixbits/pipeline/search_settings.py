"""Settings of a search of precisions: frozen, validated; no heavy library is imported for them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SearchSettings(BaseModel):
    """How the super-net is trained (`mixbits.quant.supernet`).

    ``candidates``: specs to choose among; ``held_out_share``: of the training blocks, the last ones, that the architecture
    weights are learned on; ``ratio``: compression ratio to reach, unless a number of bytes is given; ``arch_every``: training
    steps to each architecture step; ``temperatures``: at the start and at the end (None: 1, 1 for softmax and 2, 0.2 for
    gumbel); ``beta``: weight of the papers' penalty, which then takes the Lagrange multiplier's place; ``granularity``: what
    shares a choice (mode ``outputs`` mixes what ``sublayer`` or ``layer`` groups); ``basis``: what the sensitivities are made of
    (`mixbits.quant.search`: marginals for any budget; probabilities only for the search's own).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    candidates: tuple[str, ...] = ("1", "1.58", "2", "4")
    ratio: float = Field(16.0, gt=0)
    epochs: float = Field(3, gt=0, le=1e6)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    arch_every: int = Field(4, ge=1)
    arch_learning_rate: float = Field(0.05, gt=0)
    relaxation: Literal["softmax", "gumbel"] = "gumbel"
    temperatures: tuple[float, float] | None = None
    mode: Literal["weights", "outputs"] = "weights"
    granularity: Literal["matrix", "sublayer", "layer"] = "matrix"
    beta: float | None = Field(None, ge=0)
    basis: Literal["marginal", "probability"] = "marginal"
    held_out_share: float = Field(0.1, gt=0, lt=1)
    teacher_weight: float = Field(0.5, ge=0, le=1)
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
