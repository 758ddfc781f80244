"""Which layers hold a matrix that can be a unit, by exact class: the one table that finding units and packing them share.

Plain ``nn.Linear``, transformers' ``Conv1D`` (its weight is stored transposed), plain ``nn.Embedding``, and OPT's table of
learned positions. Other subclasses are left alone, because a subclass may use its weight in ways of its own (OPT's positions
are shifted by two rows; :mod:`mixbits.packing.modules` has a layer that does the same).
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "conv1d", "embedding"]

OPT_POSITIONS = "transformers.models.opt.modeling_opt.OPTLearnedPositionalEmbedding"
"""Told by name: importing OPT's module costs seconds, and a model that has the class has imported it."""
_KINDS: dict[type, Kind] = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}


def is_opt_positions(layer: nn.Module) -> bool:
    """Whether ``layer`` is OPT's table of learned positions (not a subclass of it)."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}" == OPT_POSITIONS


def layer_kind(layer: nn.Module) -> Kind | None:
    """What kind of unit a layer's weight is, or None for a layer that is none."""
    return "embedding" if is_opt_positions(layer) else _KINDS.get(type(layer))
