"""Sensitivity measures: how much the loss rises when one unit is stored in one spec. One interface, one result type.

============  ==========================================  =============================================  ==================
measure       value (nats per token)                      cost in forward-backward passes                standard error over
============  ==========================================  =============================================  ==================
hessian       1/2 trace / num_weights * perturbation      1 + 2 probes                                   probes
fisher        1/2 sum of F_i dw_i^2                       1                                              sequences
kl            KL(full, one unit quantized)                (specs + 1) * units / 3                        sequences
loss          loss with one unit quantized, minus loss    specs * units / 3                              sequences
prototypes    the same between trained uniform models     specs * units / 3, and their training          sequences
============  ==========================================  =============================================  ==================

All but ``prototypes`` need nothing but the model; :data:`MEASURES` names them all. Each takes ``around``, an allocation at which the
other units are held; :mod:`mixbits.quant.measures.interaction` iterates that. :mod:`mixbits.quant.measures.agreement` compares
measures by rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from mixbits.quant.measures.fisher import measure_fisher
from mixbits.quant.measures.hessian import measure_hessian
from mixbits.quant.measures.job import Logits, Specs
from mixbits.quant.measures.kl import measure_kl
from mixbits.quant.measures.loss import allocation_loss, measure_loss
from mixbits.quant.measures.prototypes import measure_prototypes
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import BitAllocation, ModelInventory


class Measure(Protocol):
    """What all measures share; each may have further keywords (probes, labels, prototypes)."""

    def __call__(
        self,
        model: nn.Module,
        inventory: ModelInventory,
        batches: Sequence[torch.Tensor],
        specs: Specs,
        *,
        seed: int,
        logits: Logits = ...,
        around: BitAllocation | None = None,
        show_progress: bool = False,
        provenance: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Sensitivities:
        """Sensitivities of every unit for every spec; the model is left as it was."""


MEASURES: Mapping[str, Any] = {
    "hessian": measure_hessian,
    "fisher": measure_fisher,
    "kl": measure_kl,
    "loss": measure_loss,
    "prototypes": measure_prototypes,
}
"""Name -> :class:`Measure`. ``prototypes`` needs ``prototypes=``, the trained uniform models' units."""

__all__ = [
    "MEASURES",
    "Measure",
    "allocation_loss",
    "measure_fisher",
    "measure_hessian",
    "measure_kl",
    "measure_loss",
    "measure_prototypes",
]
