"""Loss measure: the loss with one unit fake-quantized, minus the loss with it as it is: the ground truth before training.

In nats per token, paired by sequence. Costs a forward pass for each unit and spec, and so grows with both. The increase may be
negative (noise at many bits, or rounding that happens to help) and keeps its sign.

``around`` an allocation: the other units are fake-quantized there, and the unit still goes from its own weight to each spec; the
differences between a unit's specs are then those of the whole quantized model. (Starting from the unit's spec in the
allocation would shift them by a constant, which no allocator notices but for its clamp of negative values at 0.)

Limits: one unit at a time, so the sum over units misses interactions beyond those with the given allocation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mixbits.quant.curvature import evaluation_float32, split_batches
from mixbits.quant.measures.job import (
    CountedLogits,
    Logits,
    Specs,
    causal_logits,
    prepare,
    quantized_at,
    sequence_nats,
    unit_weights,
)
from mixbits.quant.measures.replace import quantized_one_at_a_time
from mixbits.quant.measures.statistics import token_mean
from mixbits.quant.sensitivity import Sensitivities
from mixbits.quant.units import unit_matrices
from mixbits.spec import BitAllocation, ModelInventory

FORWARD_SHARE = 1 / 3
"""Cost of a forward pass in forward-backward passes: backward has two matrix products for each one of forward."""


def measure_loss(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    specs: Specs,
    *,
    seed: int,
    logits: Logits = causal_logits,
    micro_batch_size: int = 8,
    around: BitAllocation | None = None,
    show_progress: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Sensitivities:
    """Measured loss increase of all units for all ``specs``, with standard errors over sequences.

    batches: token ids, each (B, T), no padding; seed: only recorded, nothing is random. Raises SpecError for no specs, DataError
    for NaN or no tokens.
    """
    job = prepare(
        model, inventory, batches, specs,
        seed=seed, micro_batch_size=micro_batch_size, around=around, provenance=provenance,
    )  # fmt: skip
    counted = CountedLogits(logits)
    units = quantized_one_at_a_time(
        job,
        lambda part: lambda: sequence_nats(counted, model, part),
        same_start=around is None,
        title="loss",
        show_progress=show_progress,
    )
    cost = FORWARD_SHARE * counted.num_tokens / job.num_read
    return Sensitivities("loss", inventory, units, cost, {**job.facts, "stderr": "over sequences, paired"})


def allocation_loss(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    allocation: BitAllocation | None,
    *,
    logits: Logits = causal_logits,
    micro_batch_size: int = 8,
) -> tuple[float, float]:
    """(loss, standard error over sequences) in nats per token with all units fake-quantized at ``allocation``; None: as they are."""
    parts = split_batches(batches, micro_batch_size)
    if allocation is not None:
        allocation.check(inventory)
    with evaluation_float32(model), torch.no_grad():
        matrices = unit_matrices(model, inventory)
        device = next(iter(matrices.values())).device
        weights = {} if allocation is None else quantized_at(matrices, allocation)
        with unit_weights(model, inventory, weights):
            sums = torch.cat([sequence_nats(logits, model, p.to(device)).cpu() for p in parts])
    return token_mean(sums, torch.cat([torch.full((len(p),), p.shape[1] - 1) for p in parts]))
