"""One unit at a time holds another weight, and a score of every sequence is compared with the score before, in pairs.

Loop: units, then micro-batches, then specs, so that the candidate weights of one unit and the logits of one micro-batch are
all that is held, and whatever a score compares with (the full model's log-probabilities) is computed once for all specs of a unit.

For :func:`one_at_a_time` the model must be in evaluation mode: the pairs differ by the unit's weight alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mixbits.errors import DataError
from mixbits.quant.curvature import evaluation_float32
from mixbits.quant.grid import fake_quantize
from mixbits.quant.measures.job import Job, unit_weights
from mixbits.quant.measures.statistics import token_mean
from mixbits.quant.progress import progress_bar
from mixbits.quant.sensitivity import UnitSensitivity
from mixbits.quant.units import unit_matrices
from mixbits.spec import QuantSpec

Score = Callable[[], torch.Tensor]
"""(B,) float64: a score of every sequence under the model as it is at the call, summed over predicted tokens."""


def one_at_a_time(
    job: Job,
    *,
    reference: Mapping[str, torch.Tensor],
    candidate: Callable[[str, QuantSpec], torch.Tensor],
    make_score: Callable[[torch.Tensor], Score],
    same_start: bool,
    title: str,
    show_progress: bool,
) -> dict[str, UnitSensitivity]:
    """For each unit and spec: the mean rise per token of the score when the unit's weight goes from ``reference`` to ``candidate``.

    reference: unit name -> (rows, cols) weight to start from; candidate(unit name, spec) -> (rows, cols); make_score(part):
    called with the model's own weights in place, the score itself with others; same_start: all units start from one and the
    same model, whose score is then computed once. Raises DataError naming unit and spec where a score is not finite.
    """
    num_tokens = torch.cat([torch.full((len(p),), p.shape[1] - 1) for p in job.parts])
    starts: dict[int, torch.Tensor] = {}
    units = {}
    total = sum(len(specs) for specs in job.specs.values()) * len(job.parts)
    with torch.no_grad(), progress_bar(title, total, step="passes", shown=show_progress) as advance:
        for unit in job.inventory.units:
            own = reference[unit.name].float()
            weights = {spec: candidate(unit.name, spec) for spec in job.specs[unit.name]}
            rises: dict[QuantSpec, list[torch.Tensor]] = {spec: [] for spec in weights}
            for index, part in enumerate(job.parts):
                score = make_score(part)
                with unit_weights(job.model, job.inventory, {**job.rest, unit.name: own}):
                    if not same_start or index not in starts:
                        starts[index] = score()
                    for spec, weight in weights.items():
                        with unit_weights(job.model, job.inventory, {unit.name: weight}):
                            rise = score() - starts[index]
                        if not bool(torch.isfinite(rise).all()):
                            raise DataError(f"unit {unit.name} at {spec}: {title} is not finite; check the model")
                        rises[spec].append(rise.cpu())
                        advance()
            found = {spec: token_mean(torch.cat(values), num_tokens) for spec, values in rises.items()}
            units[unit.name] = UnitSensitivity(
                {s: mean for s, (mean, _) in found.items()},
                {s: error for s, (_, error) in found.items()},
                {s: float((w - own).double().square().sum()) for s, w in weights.items()},
            )
    return units


def quantized_one_at_a_time(
    job: Job, make_score: Callable[[torch.Tensor], Score], *, same_start: bool, title: str, show_progress: bool
) -> dict[str, UnitSensitivity]:
    """:func:`one_at_a_time` from every unit's own weight to that weight fake-quantized, the model in evaluation mode and float32."""
    with evaluation_float32(job.model):
        own = {name: matrix.clone() for name, matrix in unit_matrices(job.model, job.inventory).items()}
        return one_at_a_time(
            job,
            reference=own,
            candidate=lambda name, spec: fake_quantize(own[name], spec),
            make_score=make_score,
            same_start=same_start,
            title=title,
            show_progress=show_progress,
        )
