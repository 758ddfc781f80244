"""Drop-in layers that multiply with the compiled kernels: any Hugging Face model packed by mixbits, unchanged otherwise.

:func:`use_kernels` replaces the packed layers of a loaded model by twins that hold the run-time layout instead of the file's
bytes (which are given up, so such a model cannot be saved again). A layer costs one call of the library, some microseconds, so
decoding one token at a time is far slower than the native engine (:mod:`mixbits.engine`), which needs a known architecture.

Limits: CPU; inference; product units keep their PyTorch layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.kernels import cpu, ops
from mixbits.kernels.cpu import Activations, PackedMatrix
from mixbits.packing.modules import PackedConv1D, PackedEmbedding, PackedLinear, PackedOPTPositions, PackedUnit


class KernelLayer(nn.Module):
    """A matrix (rows, cols) in the run-time layout; base of the layers below. Tied layers share the tensors.

    The layout lives outside the module's buffers: it has no device but the CPU and no dtype to cast to.
    """

    activation_like: torch.Tensor

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_buffer("activation_like", torch.empty(0, dtype=dtype), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> KernelLayer:
        super()._apply(fn, recurse)
        if self.activation_like.device.type not in ("cpu", "meta"):
            raise SpecError(
                "these layers run on the CPU only; load the model again without kernels to move it to a GPU"
            )
        return self

    def extra_repr(self) -> str:
        """Shape and bits for ``print(model)``."""
        return f"rows={self.matrix.rows}, cols={self.matrix.cols}, bits={self.matrix.layout.bits}"


class KernelLinear(KernelLayer):
    """``y = x W^T + b``: nn.Linear and transformers' Conv1D alike."""

    bias: nn.Parameter | None

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype, bias: nn.Parameter | None, activations: Activations) -> None:  # fmt: skip
        super().__init__(matrix, dtype)
        self.activations = activations
        self.in_features, self.out_features = matrix.cols, matrix.rows
        self.nx, self.nf = matrix.cols, matrix.rows  # as Conv1D calls them
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., cols), floating. Returns (..., rows) in x's dtype."""
        bias = None if self.bias is None else self.bias.detach()
        return ops.linear(x, self.matrix, bias, activations=self.activations)


class KernelEmbedding(KernelLayer):
    """Table lookup, exact."""

    def __init__(self, matrix: PackedMatrix, dtype: torch.dtype, padding_idx: int | None) -> None:
        super().__init__(matrix, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = matrix.rows, matrix.cols, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integer (...). Returns (..., cols) in the activations' dtype. Raises SpecError out of range."""
        return ops.embedding(ids, self.matrix).to(self.activation_like.dtype)


class KernelOPTPositions(KernelEmbedding):
    """OPT's learned positions, :class:`~mixbits.packing.modules.PackedOPTPositions`."""

    def forward(  # type: ignore[override]
        self, attention_mask: torch.Tensor, past_key_values_length: int = 0, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the packed layer's."""
        return super().forward(PackedOPTPositions.table_rows(attention_mask, past_key_values_length, position_ids))


def use_kernels(model: nn.Module, activations: Activations = "int8") -> int:
    """Replace the packed layers of ``model``, in place; returns how many now run on the compiled kernels.

    All parameters are frozen (the kernels have no gradient). activations: ``int8`` (one scale per token) or ``float32``. Raises KernelUnavailable without the compiled library,
    SpecError for an unknown kind of activations or a model that is not on the CPU.
    """
    cpu.activation_number(activations)
    cpu.library()
    model.requires_grad_(False)
    held: dict[int, PackedMatrix] = {}
    replaced = 0
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, PackedUnit) or layer.spec.is_product:
            continue
        storage = layer.storage
        if storage.weight.device.type != "cpu":
            raise SpecError(f"{name} is on {storage.weight.device}; the compiled kernels run on the CPU")
        if id(storage) not in held:
            held[id(storage)] = cpu.repack(storage.weight, storage.scale(), layer.spec, layer.rows, layer.cols)
        model.set_submodule(name, _twin(layer, held[id(storage)], activations))
        replaced += 1
    return replaced


def _twin(layer: PackedUnit, matrix: PackedMatrix, activations: Activations) -> KernelLayer:
    dtype = layer.activation_like.dtype
    if isinstance(layer, PackedEmbedding):
        table = KernelOPTPositions if isinstance(layer, PackedOPTPositions) else KernelEmbedding
        return table(matrix, dtype, layer.padding_idx)
    assert isinstance(layer, (PackedLinear, PackedConv1D))
    return KernelLinear(matrix, dtype, layer.bias, activations)
