"""Iterated allocation on small tables where the right answer is found by trying everything."""

import math

import pytest

from mixbits.errors import DataError, SpecError
from mixbits.quant.measures.interaction import iterate_allocation
from mixbits.quant.sensitivity import Sensitivities, UnitSensitivity
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, Unit

LOW, HIGH = QuantSpec(1), QuantSpec(4)
INVENTORY = ModelInventory(tuple(Unit(n, f"{n}.weight", 4, 4, "linear") for n in "abc"), ())
# Loss of every allocation of a, b, c; a and b together at one bit are bad, alone they are the least sensitive.
PAIR, ALONE = 1.0, {"a": 0.1, "b": 0.15, "c": 0.3}


def loss_of(low):
    return sum(ALONE[n] for n in low) + (PAIR if {"a", "b"} <= set(low) else 0.0)


def measure(around):
    units = {}
    for name in "abc":
        others = [n for n in "abc" if n != name and around is not None and around.specs[n] == LOW]
        increase = loss_of([*others, name]) - loss_of(others)
        units[name] = UnitSensitivity({LOW: increase, HIGH: 0.0}, {LOW: 0.0, HIGH: 0.0}, {LOW: 1.0, HIGH: 0.0})
    return Sensitivities("loss", INVENTORY, units, 2.0)


def allocate_two_low(sensitivities):
    """The two least sensitive units at one bit."""
    order = sorted("abc", key=lambda n: sensitivities.units[n].loss_increase[LOW])
    return BitAllocation({n: LOW if n in order[:2] else HIGH for n in "abc"})


def measured(allocation):
    return loss_of([n for n in "abc" if allocation.specs[n] == LOW])


def test_interactions_are_found_and_the_best_round_is_picked():
    found = iterate_allocation(measure, allocate_two_low, 6, measured_loss=measured)
    assert measured(found.rounds[0].allocation) == pytest.approx(1.25)  # a and b, each harmless alone
    assert found.rounds[0].predicted_loss_increase == pytest.approx(0.25)
    assert found.best.measured_loss == min(r.measured_loss for r in found.rounds)
    assert found.best.measured_loss < 1.25
    assert found.ended in ("same", "circle")
    assert found.cost_forward_backwards == 2.0 * len(found.rounds)


def test_it_ends_when_nothing_changes_or_rounds_are_used_up():
    independent = iterate_allocation(lambda around: measure(None), allocate_two_low, 9, measured_loss=measured)
    assert (independent.ended, len(independent.rounds)) == ("same", 2)
    assert independent.best is independent.rounds[0]
    single = iterate_allocation(measure, allocate_two_low, 1, measured_loss=measured)
    assert (single.ended, len(single.rounds)) == ("rounds", 1)


def test_a_circle_is_seen_and_nothing_is_measured_twice():
    turns = [BitAllocation(dict.fromkeys("abc", s)) for s in (LOW, HIGH, LOW)]
    calls = []

    def loss(allocation):
        calls.append(allocation)
        return 1.0

    found = iterate_allocation(measure, lambda _: turns[len(calls)], 9, measured_loss=loss)
    assert (found.ended, len(found.rounds), len(calls)) == ("circle", 3, 2)


def test_bad_input():
    with pytest.raises(SpecError, match="rounds is 0"):
        iterate_allocation(measure, allocate_two_low, 0, measured_loss=measured)
    with pytest.raises(DataError, match="round 1: the measured loss is nan"):
        iterate_allocation(measure, allocate_two_low, 2, measured_loss=lambda a: math.nan)
