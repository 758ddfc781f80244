"""The GPU layout, bit by bit against its definition, and the default choice of kernels. Needs no Triton."""

import pytest
import torch

from mixbits.errors import SpecError
from mixbits.kernels.triton.dispatch import DOT_ROWS, GEMV_ROWS, Launch, bucket, candidates, choose_kernel
from mixbits.kernels.triton.layout import is_supported, repack, repack_unit
from mixbits.packing.bitpack import pack_codes
from mixbits.packing.modules import PackedEmbedding, PackedLinear
from mixbits.scales import compact_scale, expand_scale, join_scale
from mixbits.spec import QuantSpec

SPECS = ("1", "1.58", "2", "3", "3-half-step", "4", "4-half-step", "8")
SHAPES = [(1, 1), (3, 5), (16, 256), (17, 257), (37, 301), (1, 700)]


def unit(spec, rows, cols, kind=PackedLinear):
    spec, g = QuantSpec.parse(spec), torch.Generator().manual_seed(rows + cols)
    layer = kind(spec, rows, cols)
    codes = torch.randint(0, spec.num_levels, (rows, cols), generator=g, dtype=torch.uint8)
    layer.weight.copy_(pack_codes(codes, spec.code_bits))
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=g) + 0.1)
    if spec.scale_bits == 8:
        layer.scale_codes.copy_(torch.randint(1, 256, layer.scale_codes.shape, generator=g, dtype=torch.uint8))
    return layer, codes


def slow_code(words, bits, row, col):
    """One code read from the words as the module's docstring defines them."""
    block, j, lane = col // 256, col % 256 // 8, col % 8

    def field(plane, width, index):
        word = int(words[row // 16, block, plane, row % 16, lane])
        return word % 2**32 >> width * index & (1 << width) - 1

    if bits == 3:
        return field(j // 16, 2, j % 16) | field(2, 1, j) << 2
    per = 32 // bits
    return field(j // per, bits, j % per)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_where_the_definition_says(spec, shape, monkeypatch):
    monkeypatch.setattr("mixbits.kernels.triton.layout._CHUNK_CODES", 4096)  # several chunks, cut inside bytes
    layer, codes = unit(spec, *shape)
    weight = repack_unit(layer)
    bits = weight.bits
    assert weight.words.shape == (-(-shape[0] // 16), -(-shape[1] // 256), bits, 16, 8)
    g = torch.Generator().manual_seed(0)
    picked = [*torch.randint(0, codes.numel(), (60,), generator=g).tolist(), 0, codes.numel() - 1]
    for position in picked:
        row, col = divmod(position, shape[1])
        assert slow_code(weight.words, bits, row, col) == codes[row, col]
    levels = [weight.multiply * code + weight.offset for code in range(len(layer.spec.levels))]
    unit_ = float(weight.row_scales[0] / layer.scales[0])
    assert [level * unit_ for level in levels] == list(layer.spec.levels)


@pytest.mark.parametrize("spec", ["2-g2", "3-g5", "4-half-step-g64", "2-g64-s8", "8-row-s8", "1-tensor", "1.58-g300"])
def test_scales_multiply_out_to_the_packed_layers(spec):
    layer, _ = unit(spec, 19, 131)
    weight = repack_unit(layer)
    scale = weight.row_scales[:19, None]
    if weight.group_scales is not None:
        group = torch.arange(131) // weight.group_size
        scale = weight.group_scales.float().T[:19][:, group] * scale
        assert weight.group_scales.dtype == (torch.uint8 if layer.spec.scale_bits == 8 else torch.float16)
    half = 0.5 if layer.spec.grid == "half-step" else 1.0
    wanted = layer.scales.float().view(-1, 1 if layer.spec.scale_bits == 8 else layer.spec.num_groups(131))
    if layer.spec.scale_bits == 8:
        wanted = join_scale(layer.scales.view(-1, 1), compact_scale(layer.scale_codes, layer.spec, 131))
    wanted = expand_scale(wanted, 131, layer.spec) * half
    assert torch.equal(scale.expand(19, 131), wanted.expand(19, 131))


def test_size_is_that_of_the_bits_where_nothing_is_padded():
    layer, _ = unit("2", 512, 1024)
    assert repack_unit(layer).num_bytes == 512 * 1024 // 4 + 512 * 4
    layer, _ = unit("3-g64", 512, 1024)
    assert repack_unit(layer).num_bytes == 512 * 1024 * 3 // 8 + 512 * 4 + 512 * 16 * 2


def test_tied_layer_is_that_of_its_owner():
    layer, _ = unit("4", 20, 30, PackedEmbedding)
    tied = PackedLinear(layer.spec, 20, 30, owner=layer)
    assert torch.equal(repack_unit(tied).words, repack_unit(layer).words)


def test_product_and_float_units_are_refused():
    assert [is_supported(QuantSpec.parse(s)) for s in ("2", "1.58-g64", "16", "0.5")] == [True, True, False, False]
    with pytest.raises(SpecError, match=r"0\.5-product-v16 has no GPU layout.*in PyTorch"):
        repack_unit(PackedLinear(QuantSpec(0.5), 4, 32))


def test_tensors_of_another_size_or_dtype_are_refused():
    layer, _ = unit("2-g4-s8", 5, 9)
    good = {"scales": layer.scales, "scale_codes": layer.scale_codes}
    repack(layer.weight, layer.spec, 5, 9, **good)
    with pytest.raises(SpecError, match=r"packed is torch.uint8 of 11 elements.*needs 12 of torch.uint8"):
        repack(layer.weight[:-1], layer.spec, 5, 9, **good)
    with pytest.raises(SpecError, match=r"scales is torch\.float32"):
        repack(layer.weight, layer.spec, 5, 9, scales=layer.scales.float(), scale_codes=layer.scale_codes)
    with pytest.raises(SpecError, match="got no scale_codes"):
        repack(layer.weight, layer.spec, 5, 9, scales=layer.scales)
    with pytest.raises(SpecError, match=r"expected at least \(1, 1\)"):
        repack(layer.weight, layer.spec, 0, 9, **good)


def test_default_choice_follows_the_number_of_rows():
    chosen = [choose_kernel(m, 4096, 4096, 2).kernel for m in (1, GEMV_ROWS, GEMV_ROWS + 1, DOT_ROWS, DOT_ROWS + 1)]
    assert chosen == ["gemv", "gemv", "dot", "dot", "dense"]
    small, large = choose_kernel(1, 512, 2048, 2), choose_kernel(1, 1 << 17, 2048, 2)
    assert (small.splits, large.splits) == (8, 1)  # few tiles: all blocks of K side by side
    assert not small.measured
    assert [bucket(m) for m in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]


@pytest.mark.parametrize("m", [1, 3, 16, 17, 300])
def test_candidates_are_valid_and_hold_every_kernel_that_may_win(m):
    found = list(candidates(m, 1000, 600))
    assert len(set(found)) == len(found)
    assert {launch.kernel for launch in found} == ({"gemv", "dot", "dense"} if m <= GEMV_ROWS else {"dot", "dense"})
    assert all(launch.block_m >= m for launch in found if launch.kernel == "gemv")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kernel": "wmma"}, "unknown kernel 'wmma'"),
        ({"block_n": 48}, "block_n is 48"),
        ({"kernel": "dot", "block_m": 8}, "power of two of at least 16"),
        ({"splits": 0}, "expected 1 or more"),
    ],
)
def test_impossible_launch_is_refused(change, match):
    with pytest.raises(SpecError, match=match):
        Launch(**{"kernel": "gemv", **change})
