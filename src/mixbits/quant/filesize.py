"""How large the weight file gets for any choice of one spec a unit: exact parts, and bounds of the part that is
not additive.

The file (:func:`mixbits.spec.stored_tensors`) is a header padded to a multiple, then float16 tensors (scales or
weights of the units, then all other tensors), then codes. Data bytes and most of the header add up over units;
the digits of the offsets do not, because they depend on all tensors before. Between the smallest and the
largest choice an offset is bounded, and so are its digits; with one choice left a unit the bounds meet.
`predicted_bytes` stays the only authority; the tests hold this page to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mixbits.spec import (
    FILE_METADATA,
    HEADER_MULTIPLE,
    BitAllocation,
    ModelInventory,
    QuantSpec,
    StoredTensor,
    stored_tensors,
)

_LENGTH_PREFIX_BYTES = 8
_POWERS = 10.0 ** np.arange(1, 19)


def _digits(number: np.ndarray) -> np.ndarray:
    return 1 + np.searchsorted(_POWERS, number, side="right")


@lru_cache(maxsize=4096)
def _entry_bytes(tensor: StoredTensor) -> int:
    """Length of a tensor's header entry with its comma, less the digits of its two offsets."""
    entry = {tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, 0]}}
    return len(json.dumps(entry, separators=(",", ":"))) - len("{}") + len(",") - len("00")


def padded(header: float) -> int:
    """Header length rounded up as the file does."""
    return -(-int(header) // HEADER_MULTIPLE) * HEADER_MULTIPLE


@dataclass(frozen=True)
class Within:
    """Which choices are asked about: those whose excesses (G, S; >= 0) add up to at most ``limit``.

    For any rate r >= 0 such a choice has ``sum_u x <= sum_u max_i (x_i - r * excess_i) + r * limit``, and
    likewise from below.
    """

    excess: np.ndarray
    limit: float
    rates: tuple[float, ...] = (0.0,)

    @classmethod
    def anything(cls, like: np.ndarray) -> Within:
        """No limit: every choice is asked about."""
        return cls(np.zeros(like.shape), 0.0)

    def low(self, amounts: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Lower bound of the sum over the first k + 1 units, for each k: (R, G), one row a rate, before the
        limit's share.
        """
        return np.stack([np.where(kept, amounts + r * self.excess, np.inf).min(1).cumsum() for r in self.rates])

    def settle(self, sums: np.ndarray) -> np.ndarray:
        """The best of the rates' bounds made by :meth:`low`, as whole bytes: (R, ...) -> (...)."""
        shares = np.reshape([r * self.limit for r in self.rates], (-1,) + (1,) * (sums.ndim - 1))
        return np.ceil((sums - shares).max(0) - 1e-6).astype(np.int64)


@dataclass(frozen=True)
class HeaderBounds:
    """Bounds of the unpadded header: shares (G, S) of each option, and of all that is fixed; and of the padded
    whole.
    """

    low: np.ndarray
    high: np.ndarray
    fixed_low: int
    fixed_high: int
    padded_low: int
    padded_high: int

    @property
    def is_exact(self) -> bool:
        """True when the padded header has one possible length."""
        return self.padded_low == self.padded_high


@dataclass(frozen=True)
class FileSizes:
    """G units with up to S options each: (G, S) arrays of float16 bytes, code bytes and header entries; 0 where
    no option is.
    """

    floats: np.ndarray
    codes: np.ndarray
    entries: np.ndarray
    others: tuple[StoredTensor, ...]

    @classmethod
    def of(cls, inventory: ModelInventory, options: Sequence[Sequence[QuantSpec]]) -> FileSizes:
        """Sizes of each unit stored in each of its options."""
        shape = (len(options), max(len(o) for o in options))
        floats, codes, entries = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        for g, (unit, specs) in enumerate(zip(inventory.units, options, strict=True)):
            alone = ModelInventory((unit,), ())
            for i, spec in enumerate(specs):
                for tensor in stored_tensors(alone, BitAllocation({unit.name: spec})):
                    part = floats if tensor.dtype == "F16" else codes
                    part[g, i] += tensor.num_bytes
                    entries[g, i] += _entry_bytes(tensor)
        return cls(floats, codes, entries, tuple(StoredTensor(n, "F16", shape) for n, shape in inventory.others))

    @property
    def data(self) -> np.ndarray:
        """Data bytes of each option (G, S)."""
        return self.floats + self.codes

    @property
    def other_bytes(self) -> int:
        """Data bytes of the tensors that are not units."""
        return sum(t.num_bytes for t in self.others)

    def header_bounds(self, kept: np.ndarray, within: Within | None = None) -> HeaderBounds:
        """Bounds over all choices among the options ``kept`` (G, S; at least one a unit) that are ``within``."""
        within = within or Within.anything(self.entries)
        fixed = len(json.dumps({"__metadata__": dict(FILE_METADATA)}, separators=(",", ":"))) + _LENGTH_PREFIX_BYTES
        shares, fixed_shares, totals = [], [], []
        for sign in (1, -1):  # the upper bound of x is minus the lower bound of -x
            begins_floats, end_floats, begins_codes = (sign * b for b in self._begins(kept, within, sign))
            share = self.entries + (self.floats > 0) * (_digits(begins_floats) + _digits(begins_floats + self.floats))
            share += (self.codes > 0) * (_digits(begins_codes) + _digits(begins_codes + self.codes))
            fixed_share, start = fixed, int(end_floats[0])
            for tensor in self.others:
                ends = np.array([start, start + tensor.num_bytes])
                fixed_share += _entry_bytes(tensor) + int(_digits(ends).sum())
                start += tensor.num_bytes
            shares.append(share)
            fixed_shares.append(fixed_share)
            totals.append(fixed_share + sign * int(within.settle(within.low(sign * share, kept)[:, -1])))
        return HeaderBounds(
            shares[0], shares[1], fixed_shares[0], fixed_shares[1], padded(totals[0]), padded(totals[1])
        )

    def _begins(self, kept: np.ndarray, within: Within, sign: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower bounds of ``sign`` times: where units' float tensors begin (G, 1), where the last ends (1,),
        where codes begin.
        """
        floats = np.pad(within.low(sign * self.floats, kept), ((0, 0), (1, 0)))
        both = np.pad(within.low(sign * self.data, kept), ((0, 0), (1, 0)))
        ends = within.settle(floats)
        # Before a unit's codes lie the floats of all units, all others, and the codes of the units before it.
        codes = within.settle(both + floats[:, -1:] - floats) + sign * self.other_bytes
        return ends[:-1, None], ends[-1:], codes[:-1, None]
