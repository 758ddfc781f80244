"""Scales as they are stored: float16, or one byte each times a shared float16.

With ``scale_bits=8`` a scale is ``code * super / 256`` with code 1 .. 255 and super a float16 number shared by the scales of
a row (granularity 'group') or by those of the whole unit ('row'). Super is the float16 number at or just below
``largest scale * 256 / 255``, so that the largest scale always has code 255: rounding scales that are stored already changes
nothing, and codes and supers can be computed back from the values. The factor 256 is a power of two, exact, and keeps super
away from float16's subnormal numbers. In float32 the product of a byte and a float16 number is exact.

Shared by training (`quant`) and by the packed layers and files (`packing`), which have to agree to the bit. Limits: the
smallest scale of such a set is 1/255 of the largest; all scales of a set are zero together or not at all.

Scales come in three shapes: compact, (rows, 1), (rows, num_groups) or (1, 1); flat, (num_scales,), as they are stored;
expanded, broadcastable to (rows, cols).
"""

from __future__ import annotations

import torch

from mixbits.errors import SpecError
from mixbits.spec import QuantSpec

FLOAT16_MAX = 65504.0
_TOP = 255.0


def compact_scale(flat: torch.Tensor, spec: QuantSpec, cols: int) -> torch.Tensor:
    """(num_scales,) -> (rows, 1), (rows, num_groups) or (1, 1); a spec without scales: one that is 1."""
    if not spec.has_scales:
        return flat.new_ones(1, 1)
    return flat.reshape(-1, spec.num_groups(cols))


def stored_scale(scales: torch.Tensor, scale_codes: torch.Tensor | None, spec: QuantSpec, cols: int) -> torch.Tensor:
    """Compact float32 scale of a unit with scales, from its tensors as stored; ``scale_codes`` with ``scale_bits=8`` only."""
    if scale_codes is None:
        return compact_scale(scales.float(), spec, cols)
    return join_scale(scales.view(-1, 1), compact_scale(scale_codes, spec, cols))


def expand_scale(scale: torch.Tensor, cols: int, spec: QuantSpec) -> torch.Tensor:
    """A compact scale made broadcastable to (rows, cols): itself, or (rows, cols) for granularity 'group'."""
    if spec.group_size is None:
        return scale
    rows, groups = scale.shape
    return scale.unsqueeze(2).expand(rows, groups, spec.group_size).reshape(rows, -1)[:, :cols]


def storable_scale(scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """A compact scale rounded to what can be stored, in float32. Raises SpecError when it does not fit float16."""
    if not spec.has_scales:
        return torch.ones_like(scale)
    if spec.scale_bits == 8:
        supers, codes = split_scale(scale, spec)
        return join_scale(supers, codes)
    _check_fits(scale.abs())
    return scale.to(torch.float16).float()


def split_scale(scale: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest 8-bit scales: (supers float16 (rows, 1) or (1, 1), codes uint8 of scale's compact shape)."""
    scale = scale.float()
    largest = scale.amax(1, keepdim=True) if spec.granularity == "group" else scale.max().reshape(1, 1)
    wanted = largest.clamp_min(0.0) * 256 / _TOP
    _check_fits(wanted)
    supers = wanted.to(torch.float16)
    lower = (supers.view(torch.int16) - 1).clamp_min(0).view(torch.float16)
    supers = torch.where(supers.float() > wanted, lower, supers)
    codes = (scale * 256 / supers.float().clamp_min(1e-30)).round_().clamp_(1.0, _TOP)
    return supers, codes.to(torch.uint8)


def join_scale(supers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`split_scale`: compact scales in float32, exact."""
    return codes.to(torch.float32) * (supers.float() / 256)


def _check_fits(size: torch.Tensor) -> None:
    if bool((size > FLOAT16_MAX).any()):
        raise SpecError(f"a scale of {float(size.max()):.3g} does not fit float16 (at most {FLOAT16_MAX:.0f})")
