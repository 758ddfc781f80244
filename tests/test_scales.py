"""Stored scales: rounding twice is rounding once, products exact, errors bounded, over normal and subnormal magnitudes."""

import pytest
import torch

from mixbits.errors import SpecError
from mixbits.scales import compact_scale, expand_scale, join_scale, split_scale, storable_scale
from mixbits.spec import QuantSpec

ROW = QuantSpec(2, scale_bits=8)
GROUP = QuantSpec(2, granularity="group", group_size=3, scale_bits=8)


def positive(*shape, seed=0, spread=1.0):
    return torch.exp(spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("spec", [ROW, GROUP, QuantSpec(2), QuantSpec(2, granularity="tensor")], ids=str)
@pytest.mark.parametrize("magnitude", [1e-9, 3e-8, 1e-7, 1e-6, 1e-4, 0.05, 1.0, 60.0])
def test_rounding_what_is_stored_changes_nothing(spec, magnitude):
    for seed in range(20):
        shape = {"row": (7, 1), "group": (7, 5), "tensor": (1, 1)}[spec.granularity]
        once = storable_scale(positive(*shape, seed=seed) * magnitude, spec)
        assert torch.equal(storable_scale(once, spec), once)


@pytest.mark.parametrize("spec", [ROW, GROUP], ids=str)
def test_eight_bit_scales_are_bytes_times_a_float16_and_near(spec):
    scale = positive(40, 1 if spec is ROW else 6) * 0.05
    supers, codes = split_scale(scale, spec)
    assert (supers.dtype, codes.dtype) == (torch.float16, torch.uint8)
    assert supers.shape == ((1, 1) if spec is ROW else (40, 1))
    assert codes.shape == scale.shape
    values = join_scale(supers, codes)
    assert torch.equal(values.double(), codes.double() * supers.double() / 256)  # exact in float32
    largest = scale.max() if spec is ROW else scale.amax(1, keepdim=True)
    assert torch.all(codes.amax() == 255)
    # Half a step, and what rounding the shared number down costs (2^-10 of it).
    assert torch.all((values - scale).abs() <= largest * (0.5 / 255 + 2**-10))


def test_small_scales_keep_code_one_and_zero_stays_zero():
    scale = torch.tensor([[1.0], [1e-6], [0.0]])
    assert split_scale(scale, ROW)[1].flatten().tolist() == [255, 1, 1]
    zeros = torch.zeros(3, 2)
    assert not storable_scale(zeros, GROUP).any()
    mixed = torch.tensor([[0.0, 0.0], [0.5, 0.25]])
    assert not storable_scale(mixed, GROUP)[0].any()


@pytest.mark.parametrize("spec", [ROW, GROUP, QuantSpec(2)], ids=str)
def test_scales_beyond_float16_are_refused(spec):
    with pytest.raises(SpecError, match=r"a scale of .* does not fit float16"):
        storable_scale(torch.full((2, 1), 1e6), spec)


def test_compact_and_expanded_shapes():
    flat = torch.arange(6.0)
    spec = QuantSpec(2, granularity="group", group_size=4)
    compact = compact_scale(flat, spec, 9)  # groups of 4, 4 and 1 columns
    assert compact.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert expand_scale(compact, 9, spec).tolist() == [[0] * 4 + [1] * 4 + [2], [3] * 4 + [4] * 4 + [5]]
    assert expand_scale(compact_scale(flat, QuantSpec(2), 9), 9, QuantSpec(2)).shape == (6, 1)
    product = QuantSpec(0.5, granularity="tensor")
    assert compact_scale(torch.empty(0), product, 9).tolist() == [[1.0]]
    assert storable_scale(torch.full((1, 1), 3.0), product).tolist() == [[1.0]]
