"""Drop-in layers that multiply with our kernels: any Hugging Face model packed by mixbits, unchanged otherwise.

:func:`use_kernels` replaces the packed layers of a loaded model by twins that hold the run-time layout of the device they are on: the
compiled library's on a CPU, the Triton kernels' after ``model.to("cuda")``. A layout is made from the file's bytes, which stay in
their memory map for that, and goes when the layers move on. A layer costs one call, some microseconds, so
decoding one token at a time is far slower than the native engine (:mod:`mixbits.engine`), which needs a known architecture.

Limits: CPUs and CUDA devices; inference; such a model cannot be saved again; product units keep their PyTorch layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from mixbits.errors import KernelUnavailable, SpecError
from mixbits.kernels import cpu, ops
from mixbits.kernels.cpu import Activations
from mixbits.kernels.triton.dispatch import tune
from mixbits.kernels.triton.layout import GpuWeight, repack_unit
from mixbits.packing.modules import PackedConv1D, PackedEmbedding, PackedLinear, PackedOPTPositions, PackedUnit


class KernelCodes:
    """The codes of a packed layer as they lie in the file, and the layouts made of them for layers in use. Tied layers share it."""

    def __init__(self, unit: PackedUnit) -> None:
        self.unit = unit.storage
        self._made: WeakValueDictionary[torch.device, ops.Matrix] = WeakValueDictionary()

    def on(self, device: torch.device) -> ops.Matrix:
        """The layout for ``device``. Raises KernelUnavailable without Triton for a GPU, SpecError for any other device."""
        made = self._made.get(device)
        if made is None:
            made = self._made[device] = self._make(device)
        return made

    def _make(self, device: torch.device) -> ops.Matrix:
        unit = self.unit
        if device.type == "cpu":
            return cpu.repack(unit.weight, unit.scale(), unit.spec, unit.rows, unit.cols)
        if device.type != "cuda":
            raise SpecError(
                f"there are no kernels for {device}, only for the CPU and CUDA devices; load the model again without kernels to move "
                "it there"
            )
        from mixbits.kernels.triton import run  # noqa: F401  (needs Triton, and says so before the first product)

        return repack_unit(unit, device=device)


class KernelLayer(nn.Module):
    """A matrix (rows, cols) in the run-time layout of its device; base of the layers below. Tied layers share the tensors.

    The layout lives outside the module's buffers: it is another one on another device, and has no dtype to cast to.
    """

    activation_like: torch.Tensor

    def __init__(self, codes: KernelCodes, dtype: torch.dtype) -> None:
        super().__init__()
        self.codes, self.matrix = codes, codes.on(torch.device("cpu"))
        self.register_buffer("activation_like", torch.empty(0, dtype=dtype), persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> KernelLayer:
        try:
            super()._apply(fn, recurse)
        except (AssertionError, RuntimeError) as error:  # PyTorch has many words for it
            if torch.cuda.is_available() or not re.search("CUDA|NVIDIA", str(error)):
                raise
            reason = str(error).splitlines()[0].rstrip(".")
            raise KernelUnavailable(
                f"PyTorch sees no CUDA device here ({reason:.200}); leave the model on the CPU, or install a CUDA build of PyTorch and a driver"
            ) from None
        device = self.activation_like.device
        if device.type != "meta":
            self.matrix = self.codes.on(device)
        return self

    def extra_repr(self) -> str:
        """Shape and spec for ``print(model)``."""
        return f"rows={self.matrix.rows}, cols={self.matrix.cols}, spec={self.codes.unit.spec}"


class KernelLinear(KernelLayer):
    """``y = x W^T + b``: nn.Linear and transformers' Conv1D alike."""

    bias: nn.Parameter | None

    def __init__(self, codes: KernelCodes, dtype: torch.dtype, bias: nn.Parameter | None, activations: Activations) -> None:  # fmt: skip
        super().__init__(codes, dtype)
        self.activations = activations
        self.in_features, self.out_features = self.matrix.cols, self.matrix.rows
        self.nx, self.nf = self.matrix.cols, self.matrix.rows  # as Conv1D calls them
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., cols), floating. Returns (..., rows) in x's dtype."""
        bias = None if self.bias is None else self.bias.detach()
        return ops.linear(x, self.matrix, bias, activations=self.activations)


class KernelEmbedding(KernelLayer):
    """Table lookup, exact."""

    def __init__(self, codes: KernelCodes, dtype: torch.dtype, padding_idx: int | None) -> None:
        super().__init__(codes, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = self.matrix.rows, self.matrix.cols, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integer (...). Returns (..., cols) in the activations' dtype. Raises SpecError out of range (on a GPU: a row of NaN)."""
        return ops.embedding(ids, self.matrix).to(self.activation_like.dtype)


class KernelOPTPositions(KernelEmbedding):
    """OPT's learned positions, :class:`~mixbits.packing.modules.PackedOPTPositions`."""

    def forward(  # type: ignore[override]
        self, attention_mask: torch.Tensor, past_key_values_length: int = 0, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the packed layer's."""
        return super().forward(PackedOPTPositions.table_rows(attention_mask, past_key_values_length, position_ids))


def use_kernels(model: nn.Module, activations: Activations = "int8") -> int:
    """Replace the packed layers of ``model``, in place; returns how many now run on our kernels, here and after ``.to("cuda")``.

    All parameters are frozen (the kernels have no gradient). activations: ``int8`` (one scale per token) or ``float32`` (not rounded; on a
    GPU in their own dtype, with a kernel of its own for few tokens). Raises KernelUnavailable without the compiled library,
    SpecError for an unknown kind of activations or a model that is not on the CPU.
    """
    cpu.activation_number(activations)
    cpu.library()
    model.requires_grad_(False)
    held: dict[int, KernelCodes] = {}
    replaced = 0
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, PackedUnit) or layer.spec.is_product:
            continue
        storage = layer.storage
        if storage.weight.device.type != "cpu":
            raise SpecError(f"{name} is on {storage.weight.device}; take a model on the CPU, and move it afterwards")
        if id(storage) not in held:
            held[id(storage)] = KernelCodes(storage)
        model.set_submodule(name, _twin(layer, held[id(storage)], activations))
        replaced += 1
    return replaced


def _twin(layer: PackedUnit, codes: KernelCodes, activations: Activations) -> KernelLayer:
    dtype = layer.activation_like.dtype
    if isinstance(layer, PackedEmbedding):
        table = KernelOPTPositions if isinstance(layer, PackedOPTPositions) else KernelEmbedding
        return table(codes, dtype, layer.padding_idx)
    assert isinstance(layer, (PackedLinear, PackedConv1D))
    return KernelLinear(codes, dtype, layer.bias, activations)


def tune_kernels(model: nn.Module, num_rows: Iterable[int] = (1, 4, 16, 64, 256, 1024), **options: Any) -> int:
    """Measure the Triton kernels for each kind of linear layer of a model on a GPU and numbers of tokens; returns how many were.

    The fastest are kept in a file and taken from then on (:mod:`mixbits.kernels.triton.dispatch`, :func:`~.dispatch.tune`: ``options``).
    Layers with ``int8`` activations have one kernel only. Raises SpecError when no layer has a choice.
    """
    kinds: dict[tuple[Any, ...], tuple[GpuWeight, torch.dtype]] = {}
    for layer in model.modules():
        if isinstance(layer, KernelLinear) and isinstance(layer.matrix, GpuWeight) and layer.activations != "int8":
            weight, dtype = layer.matrix, layer.activation_like.dtype
            kinds[weight.rows, weight.cols, weight.bits, weight.group_size, dtype] = weight, dtype
    if not kinds:
        raise SpecError(
            "no layer to measure; expected a model loaded with kernels='float32' and moved to a GPU: mixbits.load(...).to('cuda')"
        )
    sizes = list(num_rows)
    for weight, dtype in kinds.values():
        for size in sizes:
            tune(weight, size, dtype=dtype, **options)
    return len(kinds) * len(sizes)
