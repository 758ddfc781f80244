"""Codes to bytes: golden bytes, exact round trips, a slow twin written with Python integers, damaged input refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixbits.errors import FormatError, SpecError
from mixbits.packing import bitpack
from mixbits.packing.bitpack import check_codes, code_histogram, gather_codes, pack_codes, unpack_codes
from mixbits.spec import QuantSpec

WIDTHS = (1, 1.58, 2, 3, 4, 8)
SHAPES = [(0, 0), (0, 5), (1, 1), (1, 7), (3, 3), (5, 1), (7, 13), (31, 17), (2, 64), (97, 1), (8, 8)]
ALL_SPECS = [
    QuantSpec(1),
    QuantSpec(1.58),
    QuantSpec(2),
    QuantSpec(3),
    QuantSpec(3, "half-step"),
    QuantSpec(4),
    QuantSpec(4, "half-step"),
    QuantSpec(8),
]


def _slow_pack(codes: list[int], width: float) -> bytes:
    """The format's definition, digit by digit."""
    if width == 1.58:
        groups = [codes[i : i + 5] for i in range(0, len(codes), 5)]
        return bytes(sum(c * 3**k for k, c in enumerate(group)) for group in groups)
    stream = sum(c << (i * int(width)) for i, c in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * int(width) // 8), "little")


def _random_codes(shape: tuple[int, int], spec_or_width, seed: int = 0) -> torch.Tensor:
    width = spec_or_width
    top = len(width.levels) if isinstance(width, QuantSpec) else 3 if width == 1.58 else 2 ** int(width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, shape, generator=generator, dtype=torch.int64).to(torch.uint8)


GOLDEN = [
    (1, [1, 0, 1, 1, 0, 0, 0, 1, 1], "8d01"),
    (1.58, [2, 1, 0, 0, 2, 1, 2], "a707"),
    (2, [0, 1, 2, 3, 3], "e403"),
    (3, [0, 1, 2, 3, 4, 5, 6, 7, 5], "88c6fa05"),
    (4, [0, 1, 2, 15, 9], "10f209"),
    (8, [0, 128, 255], "0080ff"),
]


@pytest.mark.parametrize(("width", "codes", "expected"), GOLDEN)
def test_golden_bytes(width, codes, expected):
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), width)
    assert bytes(packed.tolist()).hex() == expected
    assert unpack_codes(packed, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip_size_and_slow_twin(width, shape):
    codes = _random_codes(shape, width)
    packed = pack_codes(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (QuantSpec(width).code_bytes(codes.numel()),)
    assert bytes(packed.tolist()) == _slow_pack(codes.flatten().tolist(), width)
    assert torch.equal(unpack_codes(packed, width, codes.numel()), codes.flatten())
    everywhere = torch.arange(codes.numel()).view(shape)
    assert torch.equal(gather_codes(packed, width, everywhere), codes)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), width=st.sampled_from(WIDTHS))
def test_round_trip_of_any_codes(data, width):
    top = 2 if width == 1.58 else 2 ** int(width) - 1
    codes = data.draw(st.lists(st.integers(0, top), max_size=40))
    packed = pack_codes(torch.tensor(codes, dtype=torch.uint8), width)
    assert bytes(packed.tolist()) == _slow_pack(codes, width)
    assert unpack_codes(packed, width, len(codes)).tolist() == codes


def test_noncontiguous_codes_are_read_row_by_row():
    codes = _random_codes((6, 10), 3)
    assert torch.equal(pack_codes(codes.T, 3), pack_codes(codes.T.contiguous(), 3))


def test_packing_does_not_alias_its_input():
    codes = _random_codes((4, 4), 8)
    packed = pack_codes(codes, 8)
    packed.zero_()
    assert int(codes.max()) > 0


@pytest.mark.parametrize("spec", ALL_SPECS, ids=str)
def test_every_level_of_every_grid_is_accepted(spec):
    codes = torch.arange(len(spec.levels), dtype=torch.uint8)
    packed = pack_codes(codes, spec.bit_width)
    check_codes(packed, spec, len(codes))
    assert torch.equal(unpack_codes(packed, spec.bit_width, len(codes), spec=spec), codes)


@pytest.mark.parametrize(("width", "bad"), [(3, 7), (4, 15), (8, 255)])
@pytest.mark.parametrize("position", [0, 5, 100])
def test_code_that_is_no_level_is_refused(width, bad, position):
    codes = torch.zeros(101, dtype=torch.uint8)
    codes[position] = bad
    packed = pack_codes(codes, width)
    with pytest.raises(FormatError, match=rf"layers\.0\.weight: code {bad} is out of range"):
        unpack_codes(packed, width, 101, spec=QuantSpec(width), where="layers.0.weight")
    if width < 8:
        check_codes(packed, QuantSpec(width, "half-step"), 101)


def test_ternary_byte_above_242_is_refused():
    packed = torch.tensor([242, 243], dtype=torch.uint8)
    with pytest.raises(FormatError, match="243"):
        unpack_codes(packed, 1.58, 10)
    assert unpack_codes(packed[:1], 1.58, 5).tolist() == [2] * 5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_length_is_refused(width, change):
    packed = pack_codes(_random_codes((7, 13), width), width)
    wrong = packed[:-1] if change < 0 else torch.cat([packed, packed[:1]])
    with pytest.raises(FormatError, match="model\\.x"):
        unpack_codes(wrong, width, 91, where="model.x")


def test_wrong_dtype_and_wrong_rank_are_refused():
    with pytest.raises(FormatError, match="float32"):
        unpack_codes(torch.zeros(2), 2, 8)
    with pytest.raises(FormatError, match="shape"):
        unpack_codes(torch.zeros(1, 2, dtype=torch.uint8), 2, 8)


@pytest.mark.parametrize(("width", "num_weights"), [(1, 9), (1.58, 6), (2, 5), (3, 9), (3, 3), (4, 3)])
def test_padding_must_be_zero(width, num_weights):
    packed = pack_codes(torch.zeros(num_weights, dtype=torch.uint8), width)
    packed[-1] = 200 if width == 1.58 else 128
    with pytest.raises(FormatError, match="unused bits"):
        unpack_codes(packed, width, num_weights, where="codes")


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(SpecError, match="code 4 does not fit 2 bits"):
        pack_codes(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(SpecError, match="code 3 does not fit"):
        pack_codes(torch.tensor([3], dtype=torch.uint8), 1.58)
    with pytest.raises(SpecError, match="dtype"):
        pack_codes(torch.tensor([1]), 2)
    with pytest.raises(SpecError, match="cannot pack 5"):
        pack_codes(torch.tensor([1], dtype=torch.uint8), 5)
    with pytest.raises(SpecError, match="must agree"):
        unpack_codes(torch.zeros(1, dtype=torch.uint8), 2, 4, spec=QuantSpec(4))


@pytest.mark.parametrize("width", [3, 4, 8])
def test_the_unused_code_is_found_wherever_it_stands(width):
    """Against unpacking, in streams longer than a chunk; runs of bits across codes must not be taken for one."""
    spec, top = QuantSpec(width), 2 ** int(width) - 1
    generator = torch.Generator().manual_seed(0)
    for count in (*range(1, 200), 8 * bitpack._CHUNK_BYTES // width + 77):
        codes = torch.randint(0, top, (count,), generator=generator).to(torch.uint8)
        codes[::2] = top - 1  # many set bits
        check_codes(pack_codes(codes, width), spec, count)
        for at in [*torch.randint(0, count, (3,), generator=generator).tolist(), 0, count - 1]:
            spoiled = codes.clone()
            spoiled[at] = top
            with pytest.raises(FormatError, match=f"code {top} is out of range"):
                check_codes(pack_codes(spoiled, width), spec, count)


@pytest.mark.parametrize("spec", [*ALL_SPECS, QuantSpec(0.5)], ids=str)
def test_histogram_counts_every_code(spec):
    group = 3 * bitpack._CHUNK_BYTES
    for count in (1, 2, 5, 8, 77, group + 3):
        codes = _random_codes((count,), 8 if spec.is_product else spec)
        found = code_histogram(pack_codes(codes, spec.code_bits).numpy(), spec, count)
        assert found.tolist() == torch.bincount(codes, minlength=spec.num_levels).tolist()


def test_large_unit_is_checked_in_chunks():
    num_weights = (3 << 22) * 2 + 5  # one chunk of 4-bit codes and a little
    packed = torch.zeros(QuantSpec(4).code_bytes(num_weights), dtype=torch.uint8)
    check_codes(packed, QuantSpec(4), num_weights)
    packed[-2] = 0xF0
    with pytest.raises(FormatError, match="code 15"):
        check_codes(packed, QuantSpec(4), num_weights)
