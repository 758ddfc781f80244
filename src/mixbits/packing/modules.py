"""Layers that hold packed codes and multiply with them: Linear, transformers' Conv1D, Embedding.

The weight is ``levels[codes] * scale`` computed in float32, then cast to the activations' dtype, so in float32 the result is
the fake-quantized model's bit for bit. Each forward unpacks (an embedding only the rows it looks up) and forgets;
:func:`set_weight_cache` keeps the unpacked matrices instead, four bytes a weight, for repeated scoring.

Why this way: codes (uint8) and scales (float16) are buffers; ``scales`` stay float16 whatever dtype the model is cast to,
because a bfloat16 scale would change the weights. A layer tied to another one (``owner``) holds nothing of its own, so ties
take their bytes once, survive ``.to(device)``, and need none of transformers' tying.

Limits: inference only (codes have no gradient; biases keep theirs); plain PyTorch; the unpacked matrix of one layer at a time
is the peak of the working memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mixbits.errors import SpecError
from mixbits.packing.bitpack import expand_codes, gather_codes
from mixbits.spec import QuantSpec, Unit


class PackedUnit(nn.Module):
    """A (rows, cols) matrix held as packed codes; base of the layers below.

    Buffers ``weight`` (uint8, packed) and ``scales`` (float16), uninitialized until loaded; none of them with ``owner``, the
    packed layer this one is tied to. ``dtype``: that of activations, followed when the model is cast.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    activation_like: torch.Tensor
    _kept: torch.Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        rows: int,
        cols: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        owner: PackedUnit | None = None,
    ) -> None:
        super().__init__()
        if not spec.is_quantized:
            raise SpecError("a 16-bit float unit is not packed; keep the layer itself")
        self.spec, self.rows, self.cols = spec, rows, cols
        self.__dict__["_owner"] = owner  # not a submodule: its tensors would be saved twice
        self._keep, self._kept = False, None
        if owner is None:
            codes = torch.empty(spec.code_bytes(rows * cols), dtype=torch.uint8, device=device)
            self.register_buffer("weight", codes)
            self.register_buffer(
                "scales", torch.empty(spec.num_float_scales(rows, cols), dtype=torch.float16, device=device)
            )
        elif (owner.spec, owner.rows, owner.cols) != (spec, rows, cols):
            raise SpecError(
                f"tied layers differ: ({rows}, {cols}) {spec} and ({owner.rows}, {owner.cols}) {owner.spec}"
            )
        self.register_buffer("activation_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def storage(self) -> PackedUnit:
        """The layer that holds the codes: this one, or the one it is tied to."""
        return self.__dict__["_owner"] or self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.__dict__.get("_owner") is not None:
            return  # transformers' tie_weights(); the tie is already made through ``owner``
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedUnit:
        self._kept = None
        scales = self._buffers.get("scales")
        if scales is None:
            return super()._apply(fn, recurse)
        self._buffers["scales"] = scales.view(torch.int16)  # casts of a model touch floating-point tensors only
        try:
            super()._apply(fn, recurse)
        finally:
            moved = self._buffers["scales"]
            assert moved is not None
            if moved.dtype != torch.int16 or self.weight.dtype != torch.uint8:
                raise SpecError(
                    "packed codes cannot be cast with .type(); use .to(dtype), which casts activations only"
                )
            self._buffers["scales"] = moved.view(torch.float16)
        return self

    def matrix(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The unpacked weight, (rows, cols) in ``dtype`` (default: the activations')."""
        return self.storage._dense(dtype or self.activation_like.dtype)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        if not self._keep:
            return self._unpack(dtype)
        if self._kept is None or self._kept.dtype != dtype:
            with torch.inference_mode(False), torch.no_grad():  # the kept matrix may meet autograd later
                self._kept = self._unpack(dtype)
        return self._kept

    def _unpack(self, dtype: torch.dtype) -> torch.Tensor:
        codes = expand_codes(self.weight, self.spec.bit_width, self.rows * self.cols).view(self.rows, self.cols)
        return self._oriented(_dequantize(codes, self.scales.view(-1, 1), self.spec).to(dtype))

    def _oriented(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix

    def set_cache(self, keep: bool) -> None:
        """Keep the unpacked matrix after the next use (or drop it)."""
        self._keep, self._kept = keep, None

    def extra_repr(self) -> str:
        """Shape and spec for ``print(model)``."""
        tied = ", tied" if self.storage is not self else ""
        return f"rows={self.rows}, cols={self.cols}, spec={self.spec}{tied}"


def _dequantize(codes: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """``levels[codes] * scale`` in float32; levels are equally spaced multiples of 1/2, so the arithmetic is exact."""
    low, step = spec.levels[0], spec.levels[1] - spec.levels[0]
    levels = codes.to(torch.float32)
    if step != 1:
        levels.mul_(step)
    return levels.add_(low).mul_(scale.to(torch.float32))


class PackedLinear(PackedUnit):
    """``y = x W^T + b`` with W (out_features, in_features) packed."""

    bias: nn.Parameter | None

    def __init__(
        self, spec: QuantSpec, rows: int, cols: int, *, bias: nn.Parameter | None = None, **kwargs: Any
    ) -> None:
        super().__init__(spec, rows, cols, **kwargs)
        self.in_features, self.out_features = cols, rows
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features), floating. Returns (..., out_features) in x's dtype."""
        return nn.functional.linear(x, self.matrix(x.dtype), self.bias)


class PackedConv1D(PackedUnit):
    """GPT-2's Conv1D, ``y = x W + b`` with W (in, out); packed as (out, in) like every unit."""

    bias: nn.Parameter | None

    def __init__(
        self, spec: QuantSpec, rows: int, cols: int, *, bias: nn.Parameter | None = None, **kwargs: Any
    ) -> None:
        super().__init__(spec, rows, cols, **kwargs)
        self.nx, self.nf = cols, rows
        self.register_parameter("bias", bias)

    def _oriented(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T.contiguous()  # the very layout Conv1D multiplies with: the same rounding

    def matrix(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The unpacked weight, (in, out) in ``dtype``."""
        return super().matrix(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in), floating. Returns (..., out) in x's dtype."""
        flat = x.view(-1, self.nx)
        weight = self.matrix(x.dtype)
        y = torch.addmm(self.bias, flat, weight) if self.bias is not None else flat @ weight
        return y.view(*x.shape[:-1], self.nf)


class PackedEmbedding(PackedUnit):
    """Table lookup; unpacks only the rows asked for (all of them when most are)."""

    def __init__(self, spec: QuantSpec, rows: int, cols: int, *, padding_idx: int | None = None, **kwargs: Any) -> None:
        super().__init__(spec, rows, cols, **kwargs)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, cols, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integer (...). Returns (..., embedding_dim) in the activations' dtype. Raises IndexError out of range."""
        dtype, held = self.activation_like.dtype, self.storage
        if held._keep or 2 * ids.numel() >= self.rows:
            return nn.functional.embedding(ids, self.matrix(dtype))
        rows = ids.reshape(-1).long()
        if rows.numel() and not bool(((rows >= 0) & (rows < self.rows)).all()):
            raise IndexError(
                f"token id out of range: got {int(rows.min())} .. {int(rows.max())}; the table has {self.rows} rows"
            )
        positions = rows.view(-1, 1) * self.cols + torch.arange(self.cols, device=rows.device)
        codes = gather_codes(held.weight, self.spec.bit_width, positions)
        scale = held.scales[rows] if held.scales.numel() == self.rows else held.scales
        return _dequantize(codes, scale.view(-1, 1), self.spec).to(dtype).view(*ids.shape, self.cols)


def layer_kind(layer: nn.Module) -> Literal["linear", "conv1d", "embedding"] | None:
    """What a plain layer is, or None for anything that cannot be packed (subclasses have ways of their own)."""
    kinds: dict[type, Literal["linear", "conv1d", "embedding"]] = {
        nn.Linear: "linear",
        Conv1D: "conv1d",
        nn.Embedding: "embedding",
    }
    return kinds.get(type(layer))


def packed_layer(unit: Unit, spec: QuantSpec, layer: nn.Module, *, owner: PackedUnit | None = None) -> PackedUnit:
    """The packed twin of ``layer``: same bias parameter, dtype and device, codes not filled in.

    Raises SpecError for a layer that is not a plain Linear, Conv1D or Embedding.
    """
    kind = layer_kind(layer)
    if kind is None:
        raise SpecError(f"{unit.name}: a {type(layer).__name__} cannot be packed; expected Linear, Conv1D or Embedding")
    old = layer.weight
    assert isinstance(old, torch.Tensor)
    common: dict[str, Any] = {"dtype": old.dtype, "device": old.device, "owner": owner}
    if kind == "embedding":
        return PackedEmbedding(spec, unit.rows, unit.cols, padding_idx=getattr(layer, "padding_idx", None), **common)
    packed_class = PackedConv1D if kind == "conv1d" else PackedLinear
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return packed_class(spec, unit.rows, unit.cols, bias=bias, **common)


def set_weight_cache(model: nn.Module, keep: bool = True) -> None:
    """Keep unpacked matrices of all packed layers of ``model`` after first use, 4 bytes a weight in float32 (or stop to)."""
    for module in model.modules():
        if isinstance(module, PackedUnit):
            module.set_cache(keep)
