"""Layers that hold packed codes and multiply with them: Linear, transformers' Conv1D, Embedding, OPT's position table.

The weight is ``levels[codes] * scale`` (of a product unit ``codebook[codes] * scale``) computed in float32, then cast to the
activations' dtype, so in float32 the result is the fake-quantized model's bit for bit. Each forward unpacks (an embedding
only the rows it looks up) and forgets; :func:`set_weight_cache` keeps the unpacked matrices instead, four bytes a weight,
for repeated scoring.

Why this way: codes (uint8) and scales (float16) are buffers; ``scales`` and ``codebook`` stay float16 whatever dtype the
model is cast to, because a bfloat16 scale would change the weights. A layer tied to another one (``owner``) holds nothing of
its own, so ties take their bytes once, survive ``.to(device)``, and need none of transformers' tying.

Limits: inference only (codes have no gradient; biases keep theirs); plain PyTorch; the unpacked matrix of one layer at a time
(twice with group scales) is the peak of the working memory. Only the classes of :mod:`mixbits.layers` are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.layers import is_opt_positions, layer_kind
from mixbits.packing.bitpack import expand_codes, gather_codes
from mixbits.scales import compact_scale, expand_scale, join_scale
from mixbits.spec import QuantSpec, Unit, unit_tensors

_BUFFERS = {"weight": torch.uint8, "scales": torch.float16, "scale_codes": torch.uint8, "codebook": torch.float16}
_DTYPES = {"U8": torch.uint8, "F16": torch.float16}


class PackedUnit(nn.Module):
    """A (rows, cols) matrix held as packed codes; base of the layers below.

    Buffers as :func:`mixbits.spec.unit_tensors` names them, uninitialized until loaded: ``weight`` (uint8, packed), ``scales``
    (float16), with 8-bit scales ``scale_codes`` (uint8), of product units ``codebook`` (float16); none of them with
    ``owner``, the packed layer this one is tied to. ``dtype``: that of activations, followed when the model is cast.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    scale_codes: torch.Tensor
    codebook: torch.Tensor
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
            for tensor in unit_tensors(Unit("", ".weight", rows, cols, "linear"), spec):
                empty = torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype], device=device)
                self.register_buffer(tensor.name.removeprefix("."), empty)
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
        halves = [
            name for name, b in self._buffers.items() if name in _BUFFERS and b is not None and b.dtype == torch.float16
        ]
        for name in halves:  # casts of a model touch floating-point tensors only
            self._buffers[name] = self._buffers[name].view(torch.int16)  # type: ignore[union-attr]
        try:
            super()._apply(fn, recurse)
        finally:
            for name in halves:
                moved = self._buffers[name]
                assert moved is not None
                if moved.dtype == torch.int16:
                    self._buffers[name] = moved.view(torch.float16)
        if not self.is_intact():
            raise SpecError("packed codes cannot be cast with .type(); use .to(dtype), which casts activations only")
        return self

    def is_intact(self) -> bool:
        """Whether codes and scales still have the dtypes they are stored in."""
        found = {name: b for name, b in self._buffers.items() if name in _BUFFERS and b is not None}
        return all(b.dtype == _BUFFERS[name] for name, b in found.items())

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
        codes = expand_codes(self.weight, self.spec.code_bits, self.spec.num_codes(self.rows, self.cols))
        return self._oriented(self._values(codes.view(self.rows, -1), self.scale()).to(dtype))

    def scale(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Compact float32 scale, (rows, 1), (rows, num_groups) or (1, 1), of all rows or of those asked for."""

        if not self.spec.has_scales:
            return self.codebook.new_ones(1, 1, dtype=torch.float32)

        def select(scale: torch.Tensor) -> torch.Tensor:
            return scale if rows is None or len(scale) != self.rows else scale[rows]

        stored = select(self.scales.view(-1, 1 if self.spec.scale_bits == 8 else self.spec.num_groups(self.cols)))
        if self.spec.scale_bits == 16:
            return stored.to(torch.float32)
        return join_scale(stored, select(compact_scale(self.scale_codes, self.spec, self.cols)))

    def _values(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Codes (n, codes a row) and their compact scale -> float32 (n, cols). Codebook vectors or equally spaced levels,
        multiples of 1/2, times the scale: the only rounding is that of the product.
        """
        spec = self.spec
        if spec.is_product:
            vectors = torch.index_select(self.codebook, 0, codes.reshape(-1).int())
            return vectors.to(torch.float32).view(len(codes), -1)[:, : self.cols] * scale
        low, step = spec.levels[0], spec.levels[1] - spec.levels[0]
        levels = codes.to(torch.float32)
        if step != 1:
            levels.mul_(step)
        return levels.add_(low).mul_(expand_scale(scale, self.cols, spec))

    def _oriented(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix

    def set_cache(self, keep: bool) -> None:
        """Keep the unpacked matrix after the next use (or drop it)."""
        self._keep, self._kept = keep, None

    def extra_repr(self) -> str:
        """Shape and spec for ``print(model)``."""
        tied = ", tied" if self.storage is not self else ""
        return f"rows={self.rows}, cols={self.cols}, spec={self.spec}{tied}"


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
        per_row = self.spec.num_codes(1, self.cols)
        positions = rows.view(-1, 1) * per_row + torch.arange(per_row, device=rows.device)
        codes = gather_codes(held.weight, self.spec.code_bits, positions)
        return held._values(codes, held.scale(rows)).to(dtype).view(*ids.shape, self.cols)


class PackedOPTPositions(PackedEmbedding):
    """OPT's learned positions: rows are shifted by two, and positions are counted from the attention mask if not given."""

    offset = 2

    def forward(  # type: ignore[override]
        self, attention_mask: torch.Tensor, past_key_values_length: int = 0, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """attention_mask: (batch, length) of 0 and 1; position_ids: (batch, new) instead. Returns (batch, new, cols).

        As ``OPTLearnedPositionalEmbedding.forward`` of transformers: a masked token has position -1, the row before the first.
        """
        return super().forward(self.table_rows(attention_mask, past_key_values_length, position_ids))

    @classmethod
    def table_rows(
        cls, attention_mask: torch.Tensor, past_key_values_length: int, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Which rows of the table :meth:`forward` looks up, (batch, new)."""
        if position_ids is None:
            position_ids = (torch.cumsum(attention_mask, dim=1) * attention_mask - 1).long()
            position_ids = position_ids[:, past_key_values_length:]
        return position_ids + cls.offset


def packed_layer(unit: Unit, spec: QuantSpec, layer: nn.Module, *, owner: PackedUnit | None = None) -> PackedUnit:
    """The packed twin of ``layer``: same bias parameter, dtype and device, codes not filled in.

    Raises SpecError for a layer that cannot be packed (:func:`mixbits.layers.layer_kind`).
    """
    kind, old = layer_kind(layer), layer.weight
    if kind is None:
        raise SpecError(f"{unit.name}: a {type(layer).__name__} cannot be packed; expected Linear, Conv1D or Embedding")
    assert isinstance(old, torch.Tensor)
    common: dict[str, Any] = {"dtype": old.dtype, "device": old.device, "owner": owner}
    if kind == "embedding":
        table = PackedOPTPositions if is_opt_positions(layer) else PackedEmbedding
        return table(spec, unit.rows, unit.cols, padding_idx=getattr(layer, "padding_idx", None), **common)
    packed_class = PackedConv1D if kind == "conv1d" else PackedLinear
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return packed_class(spec, unit.rows, unit.cols, bias=bias, **common)


def set_weight_cache(model: nn.Module, keep: bool = True) -> None:
    """Keep unpacked matrices of all packed layers of ``model`` after first use, 4 bytes a weight in float32 (or stop to)."""
    for module in model.modules():
        if isinstance(module, PackedUnit):
            module.set_cache(keep)
