"""Fisher measure: ``1/2 * sum_i F_i * dw_i^2`` from squared gradients of single sequences, in nats per token.

With g the gradient of a sequence's summed negative log-probability, ``F_i = sum over sequences of g_i^2 / number of tokens`` is the
diagonal of the Fisher information per token. Unlike the Hessian measure it weighs every weight's own perturbation dw_i =
Q(w)_i - w_i, is never negative, and needs one forward-backward pass over the tokens for all units and specs.

``labels``: "model" draws every target from the model's own prediction, given the true history. Then the terms of different
positions are uncorrelated and F is, without bias, the diagonal of the true Fisher information, which is the Gauss-Newton matrix of
softmax cross-entropy: the Hessian without the model's own second derivative. "data" takes the text's targets (the
empirical Fisher), which equals it only where the model fits the data.

``around`` an allocation: gradients at the model with all units fake-quantized there, perturbations from the unit's own weight.

Limits: second order and diagonal, so errors within a unit count as independent (8 bits and more: yes; 1 bit: hardly), and
the slope, which is not zero away from a minimum, is left out. Memory: a float32 copy of the units for each spec.
Sources: LeCun et al. 1990 (diagonal curvature); Kunstner et al. 2019 on what the empirical Fisher is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from mixbits.errors import DataError, SpecError
from mixbits.quant.curvature import evaluation_float32, requiring_grad
from mixbits.quant.grid import fake_quantize
from mixbits.quant.measures.job import CountedLogits, Job, Logits, Specs, causal_logits, prepare, unit_weights
from mixbits.quant.measures.statistics import token_mean
from mixbits.quant.progress import progress_bar
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.quant.units import as_matrix, unit_matrices, unit_parameters
from mixbits.spec import BitAllocation, ModelInventory

Labels = Literal["data", "model"]


def measure_fisher(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    specs: Specs,
    *,
    seed: int,
    logits: Logits = causal_logits,
    labels: Labels = "model",
    around: BitAllocation | None = None,
    show_progress: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Sensitivities:
    """Fisher sensitivities of all units for all ``specs``, with standard errors over sequences.

    batches: token ids, each (B, T), no padding; logits: see :data:`Logits`; seed: of the targets drawn from the model.
    Raises SpecError for no specs or unknown labels, DataError for NaN or no tokens.
    """
    if labels not in ("data", "model"):
        raise SpecError(f"labels is {labels!r}; expected 'model' (drawn from the model) or 'data' (the text's own)")
    job = prepare(model, inventory, batches, specs, seed=seed, micro_batch_size=1, around=around, provenance=provenance)
    counted = CountedLogits(logits)
    generator = torch.Generator().manual_seed(seed)
    squares = _squared_perturbations(job)
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in squares}
    parameters = unit_parameters(model, inventory)
    bar = progress_bar("Fisher", len(job.parts), step="sequences", shown=show_progress)
    with evaluation_float32(model), unit_weights(model, inventory, job.rest), bar as advance:
        for index, part in enumerate(job.parts):
            with requiring_grad(list(parameters.values())):
                nats = _summed_nats(counted, model, part, labels, generator, where=f"sequence {index}")
                gradients = torch.autograd.grad(nats, list(parameters.values()), allow_unused=True)
            for unit, gradient in zip(inventory.units, gradients, strict=True):
                sums[unit.name].append(_increases(unit.name, unit.kind, gradient, squares[unit.name]))
            advance()
    num_tokens = torch.tensor([p.shape[1] - 1 for p in job.parts])
    units = {name: _unit(job, name, torch.stack(sums[name]), squares[name], num_tokens) for name in squares}
    facts = {"labels": labels, "stderr": "over sequences"}
    return Sensitivities("fisher", inventory, units, counted.num_tokens / job.num_read, {**job.facts, **facts})


def _squared_perturbations(job: Job) -> dict[str, torch.Tensor]:
    """Unit name -> (number of specs, rows, cols): dw^2."""
    own = {name: matrix.float() for name, matrix in unit_matrices(job.model, job.inventory).items()}
    return {
        name: torch.stack([(fake_quantize(own[name], spec) - own[name]).square() for spec in specs])
        for name, specs in job.specs.items()
    }


def _summed_nats(
    logits: Logits, model: nn.Module, part: torch.Tensor, labels: Labels, generator: torch.Generator, *, where: str
) -> torch.Tensor:
    """-log p of one sequence's targets, summed: the text's own, or drawn from the model (on the CPU: same on any device)."""
    if part.shape[1] < 2:
        raise DataError(f"{where} has {part.shape[1]} token(s); a causal model needs 2 to predict one")
    values = logits(model, part[:, :-1]).flatten(0, 1)
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"the logits on {where} are not finite; check the model and the text")
    targets = part[:, 1:].reshape(-1)
    if labels == "model":
        probabilities = values.detach().cpu().softmax(-1)
        targets = torch.multinomial(probabilities, 1, generator=generator).flatten().to(values.device)
    return F.cross_entropy(values, targets, reduction="sum")


def _increases(name: str, kind: str, gradient: torch.Tensor | None, squares: torch.Tensor) -> torch.Tensor:
    """(number of specs,) float64: ``1/2 * sum_i g_i^2 dw_i^2`` of one sequence."""
    if gradient is None:
        return torch.zeros(len(squares), dtype=torch.float64)
    found = 0.5 * squares.flatten(1) @ as_matrix(gradient, kind).float().square().flatten()
    if not bool(torch.isfinite(found).all()):
        raise DataError(f"unit {name}: its gradient is not finite; check the model")
    return found.double().cpu()


def _unit(job: Job, name: str, sums: torch.Tensor, squares: torch.Tensor, num_tokens: torch.Tensor) -> UnitSensitivity:
    """sums: (number of sequences, number of specs)."""
    specs = job.specs[name]
    found = [token_mean(sums[:, i], num_tokens) for i in range(len(specs))]
    # No perturbation, no loss, however few the sequences.
    perturbations = [float(s.double().sum()) for s in squares]
    return UnitSensitivity(
        {s: mean for s, (mean, _) in zip(specs, found, strict=True)},
        {s: error if p > 0 else 0.0 for s, (_, error), p in zip(specs, found, perturbations, strict=True)},
        dict(zip(specs, perturbations, strict=True)),
    )
