"""Hessian traces of every unit from one Hessian-vector product a probe (Hutchinson), with standard errors.

For the mean loss L over all tokens of the batches and v with independent +-1 entries, the expectation of ``v_u
. (H v)_u`` over the entries of one unit u is the trace of u's diagonal block: cross terms between units vanish.
So one product of the whole Hessian with one v serves all units, and the cost does not grow with their number
(Xu et al., ICASSP 2021, use 50 probes on one mini-batch of 32).

How it is done: micro-batches in the outer loop, probes in the inner loop on one retained graph of the gradient
(a fresh graph a probe costs twice as much), ``torch.autograd.grad`` throughout. L is the token-weighted mean of
micro-batch losses, and so is its Hessian: ``estimate_i = sum_m weight_m * v_im . H_m v_im``. Every micro-batch
has probes of its own, which costs the same as sharing them and averages the noise of more probes; the
``estimate_i`` are still independent of each other, so their spread gives the standard error.

Limits: the standard error is that of the random probes on these very batches; it does not include which text
was drawn. Expects a loss that is twice differentiable by autograd: :func:`double_backward_ready` sees to
attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixbits.errors import DataError, SpecError
from mixbits.quant.progress import progress_bar
from mixbits.quant.units import unit_parameters
from mixbits.spec import ModelInventory

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""``loss(model, input_ids (B, T)) -> scalar``: mean nats per predicted token."""

_SIGNS_PER_BYTE = 8


@dataclass(frozen=True)
class TraceEstimate:
    """A unit's Hessian trace and its standard error over probes (infinite with one probe: it cannot be known)."""

    trace: float
    trace_stderr: float
    num_probes: int

    def __post_init__(self) -> None:
        if not math.isfinite(self.trace) or not self.trace_stderr >= 0 or self.num_probes < 1:
            raise DataError(
                f"not an estimate of a trace: {self.trace} +- {self.trace_stderr}, {self.num_probes} probes"
            )

    @classmethod
    def from_samples(cls, samples: Sequence[float]) -> TraceEstimate:
        """Mean and standard error of one independent estimate a probe."""
        count = len(samples)
        mean = math.fsum(samples) / count
        if count == 1:
            return cls(mean, math.inf, 1)
        variance = math.fsum((x - mean) ** 2 for x in samples) / (count - 1)
        return cls(mean, math.sqrt(variance / count), count)


@contextmanager
def evaluation_float32(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode and float32. Each module's mode and each tensor's type and values are back after."""
    training = [(m, m.training) for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    lowered = [(t, t.dtype) for t in tensors if t.dtype in (torch.bfloat16, torch.float16)]
    try:
        model.eval()
        for tensor, _ in lowered:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in lowered:
            tensor.data = tensor.data.to(dtype)
        for module, was in training:
            module.training = was


@contextmanager
def double_backward_ready(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode, float32, attention that can be differentiated twice. All is restored after.

    The fused attention kernels have no second derivative; PyTorch's own unfused kernel has, is exact for no
    mask, boolean and float masks alike, and serves every module that calls ``scaled_dot_product_attention``.
    (transformers' ``eager`` would serve too, but adds a boolean 4D mask as 0/1, silently wrong, so a model is
    left on ``eager`` only if it is there already.) Other implementations, such as flash attention, are switched
    to ``sdpa`` for the while.
    """
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    switch = implementation not in (None, "sdpa", "eager") and hasattr(model, "set_attn_implementation")
    with evaluation_float32(model), sdpa_kernel(SDPBackend.MATH):
        try:
            if switch:
                model.set_attn_implementation("sdpa")  # type: ignore[operator]
            yield
        finally:
            if switch:
                model.set_attn_implementation(implementation)  # type: ignore[operator]


@contextmanager
def requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within: gradients are recorded, and these parameters take part. Their own flags are back after."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, was in zip(parameters, before, strict=True):
            p.requires_grad_(was)


def num_predictions(batch: torch.Tensor) -> int:
    """Tokens a causal model predicts in a (B, T) batch without padding: the first of each row is given."""
    return batch.shape[0] * max(batch.shape[1] - 1, 1)


def split_batches(batches: Sequence[torch.Tensor], micro_batch_size: int) -> list[torch.Tensor]:
    """Micro-batches of at most ``micro_batch_size`` rows from (B, T) batches. Raises DataError if there are none."""
    for index, batch in enumerate(batches):
        if batch.dim() != 2:
            raise DataError(f"batch {index} has shape {tuple(batch.shape)}; expected token ids of shape (B, T)")
    parts = [part for batch in batches if batch.numel() for part in batch.split(micro_batch_size)]
    if not parts:
        raise DataError("no tokens to measure on: every batch is empty; give a longer text")
    return parts


def rademacher_like(parameter: torch.Tensor, generator: torch.Generator, signs: torch.Tensor) -> torch.Tensor:
    """Independent +-1 of the shape of ``parameter``: random bytes drawn on the CPU, eight signs looked up for
    each.

    signs: the table of :func:`sign_table`, on the parameter's device and in its dtype.
    """
    count = -(-parameter.numel() // _SIGNS_PER_BYTE)
    bytes_ = torch.randint(0, 256, (count,), generator=generator, dtype=torch.int32)
    return signs.index_select(0, bytes_.to(parameter.device)).flatten()[: parameter.numel()].view(parameter.shape)


def sign_table(like: torch.Tensor) -> torch.Tensor:
    """(256, 8) table: the bits of each byte as -1 and +1."""
    bits = (torch.arange(256)[:, None] >> torch.arange(_SIGNS_PER_BYTE)) & 1
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def hessian_traces(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    loss: Loss,
    *,
    num_probes: int = 50,
    seed: int,
    micro_batch_size: int = 8,
    token_count: Callable[[torch.Tensor], int] = num_predictions,
    show_progress: bool = False,
) -> dict[str, TraceEstimate]:
    """Trace of each unit's diagonal block of the Hessian of the mean loss over all tokens of ``batches``.

    batches: token ids, each (B, T); loss: mean nats per token of one micro-batch; token_count: how many tokens
    that mean is over (give one that leaves out padding if the loss does). Call it inside
    :func:`double_backward_ready`. A tied parameter is one unit. The same seed gives the same result for the
    same micro-batches on one machine. Raises SpecError for settings that make no sense, DataError (naming the
    unit where there is one) for NaN.
    """
    if num_probes < 1:
        raise SpecError(
            f"num_probes is {num_probes}; a Hessian trace needs at least 1 probe, and 2 for a standard error"
        )
    if micro_batch_size < 1:
        raise SpecError(f"micro_batch_size is {micro_batch_size}; expected at least 1 sequence")
    parameters = unit_parameters(model, inventory)
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise DataError(f"unit {name} has NaN or infinite weights; repair or retrain the model first")
    parts = split_batches(batches, micro_batch_size)
    total_tokens = sum(token_count(part) for part in parts)
    generator = torch.Generator().manual_seed(seed)
    samples = {name: [0.0] * num_probes for name in parameters}
    bar = progress_bar("Hessian", len(parts) * num_probes, step="products", shown=show_progress)
    with requiring_grad(list(parameters.values())), bar as advance:
        for index, part in enumerate(parts):
            weight = token_count(part) / total_tokens
            products = _probe_products(
                model, parameters, part, loss, num_probes, generator, where=f"micro-batch {index}"
            )
            for probe, values in enumerate(products):
                for name, value in values.items():
                    samples[name][probe] += weight * value
                advance()
    return {name: TraceEstimate.from_samples(values) for name, values in samples.items()}


def _probe_products(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    part: torch.Tensor,
    loss: Loss,
    num_probes: int,
    generator: torch.Generator,
    *,
    where: str,
) -> Iterator[dict[str, float]]:
    """For each probe: unit -> v . (H v) on one micro-batch. The graph of the gradient is built once and kept."""
    names = list(parameters)
    value = loss(model, part)
    if not bool(torch.isfinite(value)):
        raise DataError(
            f"the loss on {where} is {float(value.detach())}; expected a finite number: check the model and the text"
        )
    found = torch.autograd.grad(value, list(parameters.values()), create_graph=True, allow_unused=True)
    # A unit that the loss does not use, or uses linearly, has no graph: its second derivative is zero.
    curved = [i for i, g in enumerate(found) if g is not None and g.requires_grad]
    gradients, inputs = [found[i] for i in curved], [parameters[names[i]] for i in curved]
    tables = {(p.device, p.dtype): sign_table(p) for p in inputs}
    for probe in range(num_probes):
        result = dict.fromkeys(names, 0.0)
        if curved:
            vectors = [rademacher_like(p, generator, tables[p.device, p.dtype]) for p in inputs]
            # The graph may go with the last probe.
            keep = probe + 1 < num_probes
            products = torch.autograd.grad(gradients, inputs, vectors, retain_graph=keep, allow_unused=True)
            for i, v, hv in zip(curved, vectors, products, strict=True):
                result[names[i]] = 0.0 if hv is None else float(torch.dot(v.flatten(), hv.flatten()))
        bad = next((name for name, x in result.items() if not math.isfinite(x)), None)
        if bad is not None:
            raise DataError(
                f"unit {bad}: the Hessian-vector product on {where} is not finite (probe {probe}); the loss is not smooth "
                "there: check the model"
            )
        yield result
