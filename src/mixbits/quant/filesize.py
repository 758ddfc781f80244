"""How large the weight file gets for any choice of one spec a group of units: exact parts, and bounds of the part
that is not additive.

The file (:func:`mixbits.spec.stored_tensors`) is a header padded to a multiple, then the float16 tensors of the
units, unit by unit (scales, codebooks, float16 weights), the other tensors, and the units' bytes, unit by unit (codes,
8-bit scales). Data bytes and most of the header add up over units; the digits of the offsets do not,
because they depend on all tensors before. Between the smallest and the largest choice an offset is bounded, and so
are its digits; with one choice left a group the bounds meet. Which tensors a unit has, and how large, is asked of
:func:`mixbits.spec.unit_tensors`. `predicted_bytes` stays the only authority; the tests hold this page to it.

Shapes: U units (in file order), K groups of units that share a choice, S options, T tensors of a unit on one side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from mixbits.spec import (
    FILE_METADATA,
    HEADER_MULTIPLE,
    BitAllocation,
    ModelInventory,
    QuantSpec,
    StoredTensor,
    stored_tensors,
    unit_tensors,
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
    """Which choices are asked about: those whose excesses (K, S; >= 0) add up to at most ``limit``.

    For any rate r >= 0 such a choice has ``sum_k x <= sum_k max_i (x_i - r * excess_i) + r * limit``, and
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
        """Lower bounds (R,) of the sum over all groups of ``amounts`` (K, S), one a rate, before the limit's share."""
        return np.array([np.where(kept, amounts + r * self.excess, np.inf).min(1).sum() for r in self.rates])

    def low_before(self, amounts: np.ndarray, start: np.ndarray, kept: np.ndarray, group: np.ndarray) -> np.ndarray:
        """Lower bounds (R, U + 1) of the sum of ``amounts`` (U, S) over the units before each one (and over all), and of
        ``start`` (K, S) over all groups; before the limit's share. ``group`` (U,): the group of each unit.
        """
        order = np.argsort(group, kind="stable")
        ordered = amounts[order]
        first = np.searchsorted(group[order], group[order])  # where each unit's group begins in that order
        before = ordered.cumsum(0) - ordered
        before = before - before[first] + start[group[order]]
        is_kept, result = kept[group[order]], []
        for r in self.rates:
            free = np.where(is_kept, r * self.excess[group[order]], np.inf)
            step = np.empty(len(group))
            step[order] = (before + ordered + free).min(1) - (before + free).min(1)
            begin = np.where(kept, start + r * self.excess, np.inf).min(1).sum()
            result.append(begin + np.append(0.0, step.cumsum()))
        return np.stack(result)

    def settle(self, sums: np.ndarray) -> np.ndarray:
        """The best of the rates' bounds made by :meth:`low`, as whole bytes: (R, ...) -> (...)."""
        shares = np.reshape([r * self.limit for r in self.rates], (-1,) + (1,) * (sums.ndim - 1))
        return np.ceil((sums - shares).max(0) - 1e-6).astype(np.int64)


@dataclass(frozen=True)
class HeaderBounds:
    """Bounds of the unpadded header: shares (K, S) of each option, and of all that is fixed; and of the padded
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


def _summed(amounts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(U, S) -> (K, S)."""
    result = np.zeros((int(group.max()) + 1, amounts.shape[1]), dtype=amounts.dtype)
    np.add.at(result, group, amounts)
    return result


def _digits_of(tensors: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Digits (U, S) of the offsets of each unit's ``tensors`` (U, S, T; 0 bytes: no tensor) from ``begins`` (U, 1)."""
    ends = begins[:, :, None] + tensors.cumsum(2)
    return ((tensors > 0) * (_digits(ends - tensors) + _digits(ends))).sum(2)


@dataclass(frozen=True)
class FileSizes:
    """U units with up to S options each: bytes of every tensor before and after the other tensors (U, S, T), header
    entries (U, S); 0 where there is none. ``group`` (U,): index of the group whose choice each unit follows.
    """

    before: np.ndarray
    after: np.ndarray
    unit_entries: np.ndarray
    others: tuple[StoredTensor, ...]
    group: np.ndarray

    @classmethod
    def of(
        cls,
        inventory: ModelInventory,
        options: Sequence[Sequence[QuantSpec]],
        groups: Sequence[Sequence[str]] | None = None,
    ) -> FileSizes:
        """Sizes of each unit stored in each of the ``options`` of its group (default: each unit is a group)."""
        index = {name: k for k, names in enumerate(groups or [(u.name,) for u in inventory.units]) for name in names}
        group = np.array([index[u.name] for u in inventory.units])
        shape = (len(group), max(map(len, options)))
        sides: tuple[dict[tuple[int, int], list[int]], ...] = ({}, {})
        entries = np.zeros(shape, dtype=np.int64)
        for u, unit in enumerate(inventory.units):
            for i, spec in enumerate(options[group[u]]):
                tensors = unit_tensors(unit, spec)
                for side, dtype in zip(sides, ("F16", "U8"), strict=True):
                    side[u, i] = [t.num_bytes for t in tensors if t.dtype == dtype]
                entries[u, i] = sum(map(_entry_bytes, tensors))
        others = stored_tensors(ModelInventory((), inventory.others), BitAllocation({}))
        before, after = (_filled(side, shape) for side in sides)
        return cls(before, after, entries, others, group)

    @cached_property
    def data(self) -> np.ndarray:
        """Data bytes of each option of a group (K, S)."""
        return _summed(self.before.sum(2) + self.after.sum(2), self.group)

    @cached_property
    def data_before(self) -> np.ndarray:
        """Those of them that stand before the other tensors (K, S)."""
        return _summed(self.before.sum(2), self.group)

    @cached_property
    def entries(self) -> np.ndarray:
        """Header entries of each option of a group, less the digits of the offsets (K, S)."""
        return _summed(self.unit_entries, self.group)

    @property
    def other_bytes(self) -> int:
        """Data bytes of the tensors that are not units."""
        return sum(t.num_bytes for t in self.others)

    def header_bounds(self, kept: np.ndarray, within: Within | None = None) -> HeaderBounds:
        """Bounds over all choices among the options ``kept`` (K, S; at least one a group) that are ``within``."""
        within = within or Within.anything(kept)
        fixed = len(json.dumps({"__metadata__": dict(FILE_METADATA)}, separators=(",", ":"))) + _LENGTH_PREFIX_BYTES
        shares, fixed_shares, totals = [], [], []
        for sign in (1, -1):  # the upper bound of x is minus the lower bound of -x
            begins, start, begins_after = self._begins(kept, within, sign)
            units = self.unit_entries + _digits_of(self.before, begins) + _digits_of(self.after, begins_after)
            share, fixed_share = _summed(units, self.group), fixed
            for tensor in self.others:
                ends = np.array([start, start + tensor.num_bytes])
                fixed_share += _entry_bytes(tensor) + int(_digits(ends).sum())
                start += tensor.num_bytes
            shares.append(share)
            fixed_shares.append(fixed_share)
            totals.append(fixed_share + sign * int(within.settle(within.low(sign * share, kept))))
        return HeaderBounds(
            shares[0], shares[1], fixed_shares[0], fixed_shares[1], padded(totals[0]), padded(totals[1])
        )

    def _begins(self, kept: np.ndarray, within: Within, sign: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Lower bounds (for sign 1; upper ones for -1) of where units' tensors begin before the others (U, 1), where
        the others begin, and where units' tensors begin after them (U, 1).
        """
        before, after = self.before.sum(2), self.after.sum(2)
        none = np.zeros(kept.shape, dtype=np.int64)
        begins = sign * within.settle(within.low_before(sign * before, none, kept, self.group))
        # Before a unit's codes lies what all units have before the others, all others, and the codes of the units before it.
        codes = within.low_before(sign * after, sign * self.data_before, kept, self.group)
        begins_after = sign * within.settle(codes) + self.other_bytes
        return begins[:-1, None], int(begins[-1]), begins_after[:-1, None]


def _filled(sizes: Mapping[tuple[int, int], Sequence[int]], shape: tuple[int, int]) -> np.ndarray:
    """Lists of tensor sizes per unit and option as (U, S, T), 0 where there is none."""
    result = np.zeros((*shape, max(1, *map(len, sizes.values()))), dtype=np.int64)
    for place, values in sizes.items():
        result[place][: len(values)] = values
    return result
