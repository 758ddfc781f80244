"""What every measure starts from, checked once: model, units, specs, sequences; and units holding other weights for a while.

Specs may be one list for all units, or a mapping from unit name to a list where some specs fit some units only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixbits.errors import DataError, SpecError
from mixbits.quant.curvature import split_batches
from mixbits.quant.fingerprint import data_hash, model_hash
from mixbits.quant.grid import fake_quantize
from mixbits.quant.units import unit_matrices
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec

Specs = Sequence[QuantSpec] | Mapping[str, Sequence[QuantSpec]]
Logits = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""``logits(model, input_ids (B, T)) -> (B, T, V)``."""


def causal_logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of a causal language model of transformers."""
    return model(input_ids=input_ids, use_cache=False).logits


@dataclass
class CountedLogits:
    """``logits`` that counts the tokens it was given, so that a measure's cost is counted rather than claimed."""

    logits: Logits
    num_tokens: int = 0

    def __call__(self, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        self.num_tokens += input_ids.numel()
        return self.logits(model, input_ids).float()


@dataclass(frozen=True)
class Job:
    """A checked measuring job.

    ``parts``: micro-batches of token ids (B, T) on the model's device; ``specs``: unit name -> what to measure, without
    repeats; ``rest``: unit name -> (rows, cols) weight that units hold while another one varies, empty: their own.
    """

    model: nn.Module
    inventory: ModelInventory
    parts: list[torch.Tensor]
    specs: Mapping[str, tuple[QuantSpec, ...]]
    rest: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """Sequences measured on."""
        return sum(len(p) for p in self.parts)

    @property
    def num_read(self) -> int:
        """Tokens one forward pass over everything reads: all but the last of each sequence."""
        return sum(p.shape[0] * (p.shape[1] - 1) for p in self.parts)


def prepare(
    model: nn.Module,
    inventory: ModelInventory,
    batches: Sequence[torch.Tensor],
    specs: Specs,
    *,
    seed: int,
    micro_batch_size: int,
    around: BitAllocation | None,
    provenance: Mapping[str, Any] | None,
) -> Job:
    """Check what a measure is given and put the facts for its file together.

    Raises SpecError (no specs, an allocation or specs that miss a unit), DataError (empty batches, NaN in a unit).
    """
    wanted = _unit_specs(inventory, specs)
    if micro_batch_size < 1:
        raise SpecError(f"micro_batch_size is {micro_batch_size}; expected at least 1 sequence")
    if around is not None:
        around.check(inventory)
    matrices = unit_matrices(model, inventory)
    for name, matrix in matrices.items():
        if not bool(torch.isfinite(matrix).all()):
            raise DataError(f"unit {name} has NaN or infinite weights; repair or retrain the model first")
    device = next(iter(matrices.values())).device
    parts = [p.to(device) for p in split_batches(batches, micro_batch_size)]
    warnings = []
    if sum(len(p) for p in parts) == 1:
        warnings.append("a single sequence: how far the result depends on the text is unknown")
    facts = {
        "seed": seed,
        "num_tokens": sum(p.shape[0] * max(p.shape[1] - 1, 1) for p in parts),
        "num_sequences": sum(len(p) for p in parts),
        "micro_batch_size": micro_batch_size,
        "model_hash": model_hash(model),
        "data_hash": data_hash(batches),
        "around": None if around is None else {n: str(s) for n, s in around.specs.items()},
        "warnings": warnings,
    }
    rest = {} if around is None else quantized_at(matrices, around)
    return Job(model, inventory, parts, wanted, rest, facts | dict(provenance or {}))


def quantized_at(matrices: Mapping[str, torch.Tensor], allocation: BitAllocation) -> dict[str, torch.Tensor]:
    """Every unit's (rows, cols) weight, fake-quantized at ``allocation``."""
    return {name: fake_quantize(matrix.float(), allocation.specs[name]) for name, matrix in matrices.items()}


def _unit_specs(inventory: ModelInventory, specs: Specs) -> dict[str, tuple[QuantSpec, ...]]:
    if not isinstance(specs, Mapping):
        specs = {u.name: specs for u in inventory.units}
    result = {}
    for unit in inventory.units:
        result[unit.name] = tuple(dict.fromkeys(specs.get(unit.name, ())))
        if not result[unit.name]:
            raise SpecError(f"no specs to measure for unit {unit.name}; give at least one, e.g. 1,1.58,2,3,4,8")
    return result


@contextmanager
def unit_weights(model: nn.Module, inventory: ModelInventory, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within: the named units hold these (rows, cols) weights. Afterwards they hold their own again, bit by bit."""
    held = unit_matrices(model, inventory) if weights else {}
    kept = {name: held[name].clone() for name in weights}
    try:
        for name, weight in weights.items():
            if weight.shape != held[name].shape:
                raise SpecError(f"unit {name}: a weight of shape {tuple(weight.shape)}, not {tuple(held[name].shape)}")
            held[name].copy_(weight)
        yield
    finally:
        for name, own in kept.items():
            held[name].copy_(own)


def sequence_nats(logits: Logits, model: nn.Module, part: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of each sequence, summed over its tokens but the first: (B,) float64 nats.

    part: (B, T). Raises DataError for sequences of one token.
    """
    if part.shape[1] < 2:
        raise DataError(f"sequences of {part.shape[1]} token(s); a causal model needs 2 to predict one")
    values = logits(model, part[:, :-1])
    flat = F.cross_entropy(values.flatten(0, 1), part[:, 1:].reshape(-1), reduction="none")
    return flat.view(len(part), -1).double().sum(1)
