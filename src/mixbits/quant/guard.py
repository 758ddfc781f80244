"""Never worse than uniform: a trained learned allocation against the best uniform one of no more bytes.

Predicted losses are guarded where they are solved (:mod:`mixbits.quant.problem`). This page judges measured ones: after
training, on validation text, the lower loss wins, whatever was predicted. The words say how sure that is; the choice
does not wait for significance, because one of the two has to be returned.

Limits: whoever calls trains and measures both, with the same steps, on the same text; test text must not be used to choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mixbits.errors import DataError, SpecError
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, compression_ratio, predicted_bytes


@dataclass(frozen=True)
class Measured:
    """A trained allocation: bytes of its file, validation loss in nats per token, and, for a uniform one, the standard
    error of its paired difference to the learned one (None: unknown). Raises DataError for values that cannot be.
    """

    name: str
    bytes: int
    nats: float
    stderr: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bytes, bool) or not isinstance(self.bytes, int) or self.bytes < 1:
            raise DataError(f"{self.name}: bytes is {self.bytes!r}; expected the size of its weight file")
        if not math.isfinite(self.nats):
            raise DataError(
                f"{self.name}: validation loss is {self.nats} nats; expected a finite number: train it again"
            )
        if self.stderr is not None and not (math.isfinite(self.stderr) and self.stderr >= 0):
            raise DataError(f"{self.name}: standard error is {self.stderr}; expected a number of at least 0, or None")


@dataclass(frozen=True)
class Winner:
    """What to return: the measured winner, whether it is the learned one, the uniform one it was held against (None: none
    fits), learned minus uniform in nats per token, and a sentence with the figures.
    """

    winner: Measured
    is_learned: bool
    uniform: Measured | None
    delta_nats: float | None
    sentence: str


def choose_winner(learned: Measured, uniform: Sequence[Measured], max_bytes: int) -> Winner:
    """The learned allocation, or the best uniform one within ``max_bytes`` if that has less loss.

    At equal loss the learned one is kept. Raises SpecError if the learned one does not fit itself.
    """
    if learned.bytes > max_bytes:
        raise SpecError(f"{learned.name} takes {learned.bytes} bytes, over the budget of {max_bytes}; allocate again")
    fitting = [u for u in uniform if u.bytes <= max_bytes]
    if not fitting:
        return Winner(
            learned, True, None, None, f"no uniform allocation measured fits {max_bytes:,} bytes; {learned.name} stands"
        )
    best = min(fitting, key=lambda u: (u.nats, u.bytes, u.name))
    delta = learned.nats - best.nats
    if delta > 0:
        verdict, winner = f"loses to {_shown(best)} by", best
    else:
        verdict, winner = f"is no worse than the best uniform allocation that fits, {_shown(best)}: less by", learned
    end = f"; {best.name} is returned" if delta > 0 else ""
    sentence = (
        f"{_shown(learned)} {verdict} {abs(delta):.4f} nats per token{_sureness(abs(delta), best.stderr)}, within "
        f"{max_bytes:,} bytes{end}"
    )
    return Winner(winner, winner is learned, best, delta, sentence)


def _shown(item: Measured) -> str:
    return f"{item.name} ({item.nats:.4f} nats, {item.bytes:,} bytes)"


def _sureness(delta: float, stderr: float | None) -> str:
    if stderr is None:
        return " (standard error unknown)"
    if delta <= 2 * stderr:
        return f" (standard error {stderr:.4f}: they cannot be told apart)"
    return f" (standard error {stderr:.4f})"


def uniform_allocations(
    inventory: ModelInventory, specs: Sequence[QuantSpec], max_bytes: int
) -> tuple[BitAllocation, ...]:
    """Every uniform allocation of ``specs`` whose file takes at most ``max_bytes``, largest file first; bytes and ratio in
    provenance. Where the higher bits of position tables do not fit, they have the same spec as everything else. Empty if none fits.
    """
    found = []
    for spec in dict.fromkeys(specs):
        for everywhere in (False, True):
            allocation = BitAllocation.uniform(inventory, spec, everywhere=everywhere)
            size = predicted_bytes(inventory, allocation)
            if size <= max_bytes:
                facts = {"predicted_bytes": size, "compression_ratio": compression_ratio(inventory, size)}
                found.append((size, BitAllocation(allocation.specs, {**allocation.provenance, **facts})))
                break
    return tuple(allocation for _, allocation in sorted(found, key=lambda pair: -pair[0]))
