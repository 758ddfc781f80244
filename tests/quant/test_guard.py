"""The guard on measured losses: who wins, what the sentence says; all uniform allocations that fit."""

import math

import pytest

from mixbits.errors import DataError, SpecError
from mixbits.quant.guard import Measured, choose_winner, uniform_allocations
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, Unit, parse_specs, predicted_bytes

UNIFORM = (
    Measured("uniform-1", 600, 4.80, 0.003),
    Measured("uniform-1.58", 800, 4.70, 0.003),
    Measured("uniform-2", 1200, 4.60, 0.003),
)


def test_the_learned_one_wins_against_the_best_uniform_that_fits_not_a_larger_one():
    result = choose_winner(Measured("learned-16x", 990, 4.65), UNIFORM, 1000)
    assert result.is_learned
    assert result.winner.name == "learned-16x"
    assert result.uniform.name == "uniform-1.58"
    assert result.delta_nats == pytest.approx(-0.05)
    assert result.sentence == (
        "learned-16x (4.6500 nats, 990 bytes) is no worse than the best uniform allocation that fits, uniform-1.58 (4.7000 "
        "nats, 800 bytes): less by 0.0500 nats per token (standard error 0.0030), within 1,000 bytes"
    )


def test_a_learned_one_that_loses_is_replaced_and_the_sentence_says_so():
    result = choose_winner(Measured("learned-16x", 1000, 4.71), UNIFORM, 1000)
    assert not result.is_learned
    assert result.winner == UNIFORM[1]
    assert result.delta_nats == pytest.approx(0.01)
    assert result.sentence == (
        "learned-16x (4.7100 nats, 1,000 bytes) loses to uniform-1.58 (4.7000 nats, 800 bytes) by 0.0100 nats per token "
        "(standard error 0.0030), within 1,000 bytes; uniform-1.58 is returned"
    )


def test_a_smaller_uniform_one_with_less_loss_is_the_one_to_beat():
    odd = (*UNIFORM, Measured("uniform-3", 900, 4.9))
    assert choose_winner(Measured("l", 999, 4.75), odd, 1000).winner.name == "uniform-1.58"


def test_ties_doubts_and_unknown_errors_are_told():
    tie = choose_winner(Measured("l", 900, 4.70), UNIFORM, 1000)
    assert tie.is_learned
    assert "cannot be told apart" in tie.sentence
    close = choose_winner(Measured("l", 900, 4.705), UNIFORM, 1000)
    assert not close.is_learned
    assert "0.0050 nats per token (standard error 0.0030: they cannot be told apart)" in close.sentence
    unknown = choose_winner(Measured("l", 900, 4.8), [Measured("u", 900, 4.7)], 900)
    assert "(standard error unknown)" in unknown.sentence


def test_nothing_to_compare_with_and_bad_values():
    alone = choose_winner(Measured("l", 500, 5.0), UNIFORM, 599)
    assert (alone.is_learned, alone.uniform, alone.delta_nats) == (True, None, None)
    assert "no uniform allocation measured fits 599 bytes" in alone.sentence
    with pytest.raises(SpecError, match="l takes 700 bytes, over the budget of 600"):
        choose_winner(Measured("l", 700, 5.0), UNIFORM, 600)
    for size, nats, stderr, message in (
        (0, 1.0, None, "bytes is 0"),
        (5, math.nan, None, "loss is nan"),
        (5, 1.0, -1.0, "error is -1"),
        (5, 1.0, math.nan, "error is nan"),
    ):
        with pytest.raises(DataError, match=message):
            Measured("m", size, nats, stderr)


def test_uniform_allocations_are_all_that_fit_largest_first():
    inventory = ModelInventory(
        (Unit("a", "a.weight", 40, 30, "linear"), Unit("embed_positions", "p.weight", 9, 8, "embedding")),
        (("b", (3,)),),
    )
    specs = parse_specs(["2", "1", "8", "2", "4", "1.58"])
    sizes = {s: predicted_bytes(inventory, BitAllocation.uniform(inventory, s)) for s in specs}
    found = uniform_allocations(inventory, specs, sizes[QuantSpec(4)])
    assert [a.specs["a"] for a in found] == list(parse_specs(["4", "2", "1.58", "1"]))
    assert [a.provenance["predicted_bytes"] for a in found] == [sizes[a.specs["a"]] for a in found]
    assert found[-1].specs == BitAllocation.uniform(inventory, QuantSpec(1)).specs
    everywhere = BitAllocation(dict.fromkeys(("a", "embed_positions"), QuantSpec(1)))
    smallest = predicted_bytes(inventory, everywhere)
    (last,) = uniform_allocations(inventory, specs, smallest)  # too small for position tables of 4 bits
    assert dict(last.specs) == dict(everywhere.specs)
    assert last.provenance["method"] == "uniform 1-papers-row, position tables too"
    assert uniform_allocations(inventory, specs, smallest - 1) == ()
