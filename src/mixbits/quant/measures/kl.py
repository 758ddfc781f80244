"""KL measure: ``KL(P_full || P_with one unit quantized)`` of the next token, averaged over positions (Xu et al., the journal version).

In nats per token: the expected loss increase if the full model were the truth. It needs no labels, is never negative but for rounding,
and varies less from text to text than the measured loss. Costs a forward pass for each unit and spec, and one more a unit,
because the full model's log-probabilities are computed again for each unit rather than kept: what is held is the
log-probabilities of one micro-batch, twice.

``around`` an allocation: the other units are fake-quantized there, and the value is how much the divergence from the full
model rises when the unit goes from its own weight to a spec (it may then be negative).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixbits.errors import DataError
from mixbits.quant.measures.job import CountedLogits, Logits, Specs, causal_logits, prepare
from mixbits.quant.measures.loss import FORWARD_SHARE
from mixbits.quant.measures.replace import Score, quantized_one_at_a_time
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import BitAllocation, ModelInventory


def measure_kl(
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
    """KL sensitivities of all units for all ``specs``, with standard errors over sequences.

    batches: token ids, each (B, T), no padding; seed: only recorded, nothing is random. Raises SpecError for no specs, DataError
    for NaN or no tokens.
    """
    job = prepare(
        model, inventory, batches, specs,
        seed=seed, micro_batch_size=micro_batch_size, around=around, provenance=provenance,
    )  # fmt: skip
    counted = CountedLogits(logits)

    def make_score(part: torch.Tensor) -> Score:
        if part.shape[1] < 2:
            raise DataError(f"sequences of {part.shape[1]} token(s); a causal model needs 2 to predict one")
        full = counted(model, part[:, :-1]).log_softmax(-1)
        return lambda: _divergences(full, counted(model, part[:, :-1]))

    units = quantized_one_at_a_time(job, make_score, same_start=around is None, title="KL", show_progress=show_progress)
    cost = FORWARD_SHARE * counted.num_tokens / job.num_read
    return Sensitivities("kl", inventory, units, cost, {**job.facts, "stderr": "over sequences"})


def _divergences(full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(full || softmax(logits)) of each sequence, summed over positions: (B,) float64.

    full: log-probabilities (B, T, V). One sequence after the other, which bounds the memory.
    """
    pairs = zip(full, logits, strict=True)
    return torch.stack([
        F.kl_div(other.log_softmax(-1), own, reduction="none", log_target=True).sum(dtype=torch.float64)
        for own, other in pairs
    ])  # fmt: skip
