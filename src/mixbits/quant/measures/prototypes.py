"""After-training measure: trained uniform models lend each other single units, and the loss is measured.

A prototype is a model trained with all units at one spec; the papers start mixed models from such weights. Into
the prototype of the highest precision (the base) one unit of another prototype is put, and the value is the loss increase,
paired by sequence, in nats per token. Unlike the other measures this one sees what quantized training does to the weights.

``around`` an allocation: the other units come from the prototypes it names; the unit goes from the base's weight to each prototype's.

A unit that the prototypes do not hold at their own spec (uniform models keep position tables at 4 bits) has no trained weights at
fewer bits: named in ``untrained``, it is rounded from the base's weight, so that its loss is not that of other bits.

Limits: costs a training run for each spec (not counted in the cost, which is that of measuring); units of different prototypes
were never trained together, so the increases are larger than what is left after joint training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mixbits.errors import DataError, SpecError
from mixbits.quant.curvature import evaluation_float32
from mixbits.quant.grid import fake_quantize
from mixbits.quant.measures.job import CountedLogits, Logits, Specs, causal_logits, prepare, sequence_nats
from mixbits.quant.measures.loss import FORWARD_SHARE
from mixbits.quant.measures.replace import one_at_a_time
from mixbits.quant.sensitivity import Sensitivities
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec

Prototypes = Mapping[QuantSpec, Mapping[str, torch.Tensor]]
"""Spec -> unit name -> (rows, cols) float weight, dequantized, of a model trained uniformly at that spec."""


def measure_prototypes(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    specs: Specs,
    *,
    seed: int,
    prototypes: Prototypes,
    base: QuantSpec | None = None,
    untrained: Collection[str] = (),
    logits: Logits = causal_logits,
    micro_batch_size: int = 8,
    around: BitAllocation | None = None,
    show_progress: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Sensitivities:
    """Loss increase when one unit of the base prototype is replaced, for all units and all ``specs``.

    model: the base prototype (its norms and biases are used as they are; its units are overwritten for the while);
    base: the spec to start from, by default the one of most bits; untrained: names of units that are rounded from the base's weight
    instead; seed: only recorded. Raises SpecError for a spec that has
    no prototype or a prototype that misses a unit, DataError for NaN or no tokens.
    """
    base = _base(prototypes, base)
    job = prepare(
        model,
        inventory,
        batches,
        specs,
        seed=seed,
        micro_batch_size=micro_batch_size,
        around=None,
        provenance=provenance,
    )
    if around is not None:
        around.check(inventory)
    for spec in dict.fromkeys([base, *(s for own in job.specs.values() for s in own)]):
        for unit in inventory.units:
            if spec in job.specs[unit.name] or spec == base:
                _check(prototypes, unit.name, spec, (unit.rows, unit.cols))
    start = {u.name: prototypes[base][u.name] for u in inventory.units}
    if around is not None:
        for name, spec in around.specs.items():
            _check(prototypes, name, spec, tuple(start[name].shape))

    def candidate(name: str, spec: QuantSpec) -> torch.Tensor:
        own = start[name].float()
        return fake_quantize(own, spec) if name in untrained else prototypes[spec][name].float()

    rest = start if around is None else {n: candidate(n, s) for n, s in around.specs.items()}
    where = None if around is None else {n: str(s) for n, s in around.specs.items()}
    counted = CountedLogits(logits)
    with evaluation_float32(model):
        units = one_at_a_time(
            replace(job, rest=rest),
            reference=start,
            candidate=candidate,
            make_score=lambda part: lambda: sequence_nats(counted, model, part),
            same_start=around is None,
            title="prototypes",
            show_progress=show_progress,
        )
    facts = {"base": str(base), "around": where, "untrained": sorted(untrained), "stderr": "over sequences, paired"}
    cost = FORWARD_SHARE * counted.num_tokens / job.num_read
    return Sensitivities("prototypes", inventory, units, cost, {**job.facts, **facts})


def _base(prototypes: Prototypes, base: QuantSpec | None) -> QuantSpec:
    if not prototypes:
        raise SpecError("no prototypes; expected at least one model trained uniformly at a spec")
    return max(prototypes, key=lambda s: s.bit_width) if base is None else base


def _check(prototypes: Prototypes, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> None:
    if spec not in prototypes:
        raise SpecError(
            f"no prototype at {spec}; there are {', '.join(map(str, prototypes))}: train one, or leave it out"
        )
    weight = prototypes[spec].get(name)
    if weight is None:
        raise SpecError(f"the prototype at {spec} misses unit {name}")
    if tuple(weight.shape) != shape:
        raise SpecError(f"the prototype at {spec}: unit {name} is {tuple(weight.shape)}; expected {shape}")
    if not bool(torch.isfinite(weight).all()):
        raise DataError(f"the prototype at {spec}: unit {name} has NaN or infinite weights; train it again")
