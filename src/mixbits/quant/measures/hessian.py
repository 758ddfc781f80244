"""Hessian measure: ``1/2 * trace / num_weights * perturbation``, the second-order prediction of Xu et al. (ICASSP 2021).

In nats per token. Cost: one graph of forward and backward, then each probe runs backward through both; it does not grow with
the number of units or specs. A negative trace (a saddle, or noise) keeps its sign.

``around`` an allocation: the curvature is that of the model with all units fake-quantized there, the perturbation is still taken from
the unit's own weight.

Limits: assumes a trained model at a minimum, noise independent of the weights and equal curvature within a unit; ignores
what training repairs afterwards. The standard error is that of the probes, not of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mixbits.errors import SpecError
from mixbits.quant.curvature import Loss, TraceEstimate, double_backward_ready, hessian_traces, num_predictions
from mixbits.quant.grid import perturbation
from mixbits.quant.measures.job import Logits, Specs, causal_logits, prepare, sequence_nats, unit_weights
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.quant.units import unit_matrices
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec


def hessian_sensitivity(
    trace: TraceEstimate, num_weights: int, perturbations: Mapping[QuantSpec, float]
) -> UnitSensitivity:
    """``1/2 * trace / num_weights * perturbation`` per spec, signed, with the standard error of the trace
    carried over.
    """
    factor = 0.5 / num_weights
    return UnitSensitivity(
        {s: factor * trace.trace * p for s, p in perturbations.items()},
        # 0 * inf: no perturbation, no loss, however uncertain the trace.
        {s: factor * trace.trace_stderr * p if p > 0 else 0.0 for s, p in perturbations.items()},
        dict(perturbations),
        trace,
    )


def measure_hessian(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    specs: Specs,
    *,
    seed: int,
    logits: Logits = causal_logits,
    loss: Loss | None = None,
    num_probes: int = 50,
    micro_batch_size: int = 8,
    token_count: Callable[[torch.Tensor], int] = num_predictions,
    around: BitAllocation | None = None,
    show_progress: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Sensitivities:
    """Hessian sensitivities of all units for all ``specs``; see :func:`mixbits.quant.curvature.hessian_traces`.

    loss: mean nats per token of a micro-batch, twice differentiable (default: cross-entropy of ``logits``); token_count:
    how many tokens that mean is over. Switches the model for the while (:func:`double_backward_ready`) and leaves it as
    it was. ``provenance``: entries to add to the file's. Raises SpecError for no specs or probes, DataError for NaN or no tokens.
    """
    if num_probes < 1:
        raise SpecError(f"num_probes is {num_probes}; a Hessian trace needs at least 1, and 2 for a standard error")
    shared = {"seed": seed, "micro_batch_size": micro_batch_size}
    job = prepare(model, inventory, batches, specs, around=around, provenance=provenance, **shared)  # type: ignore[arg-type]

    def cross_entropy(model: nn.Module, part: torch.Tensor) -> torch.Tensor:
        return sequence_nats(logits, model, part).sum().float() / num_predictions(part)

    with double_backward_ready(model), unit_weights(model, inventory, job.rest):
        traces = hessian_traces(
            model, inventory, job.parts, loss or cross_entropy,
            num_probes=num_probes, token_count=token_count, show_progress=show_progress, **shared,
        )  # fmt: skip
    matrices = unit_matrices(model, inventory)
    units = {}
    for unit in inventory.units:
        perturbations = {spec: perturbation(matrices[unit.name], spec) for spec in job.specs[unit.name]}
        units[unit.name] = hessian_sensitivity(traces[unit.name], unit.num_weights, perturbations)
    warnings = list(job.facts["warnings"])
    if num_probes == 1:
        warnings.append("one probe: the standard error of the traces is unknown")
    if len(job.parts) == 1:
        warnings.append(
            "a single micro-batch: the traces are those of these few sequences, and their error leaves that out"
        )
    facts = {
        "num_probes": num_probes,
        "num_tokens": sum(token_count(p) for p in job.parts),
        "negative_traces": [name for name, t in traces.items() if t.trace < 0],
        "stderr": "over probes on these tokens; the choice of text is not included",
        "warnings": warnings,
    }
    return Sensitivities("hessian", inventory, units, 1.0 + 2.0 * num_probes, {**job.facts, **facts})
