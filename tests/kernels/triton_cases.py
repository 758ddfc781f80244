"""The Triton kernels against float64 products of the slow reference's codes; run by test_triton.py and test_triton_gpu.py.

Triton decides at its first import whether kernels are interpreted, and other tests import it, so this file runs in a process of its own:
``TRITON_INTERPRET=1 pytest tests/kernels/triton_cases.py``, or on a GPU ``MIXBITS_TEST_DEVICE=cuda pytest ...``.
"""

import dataclasses
import math
import os

import pytest
import torch

from mixbits.errors import FormatError, KernelUnavailable, SpecError
from mixbits.kernels.triton import dispatch, run
from mixbits.kernels.triton.dispatch import Launch
from mixbits.kernels.triton.layout import repack_unit
from mixbits.packing.bitpack import expand_codes, pack_codes
from mixbits.packing.modules import PackedLinear
from mixbits.spec import QuantSpec

DEVICE = os.environ.get("MIXBITS_TEST_DEVICE", "cpu")
if DEVICE == "cpu" and not run.INTERPRETED:
    pytest.skip("neither a GPU nor Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

GRIDS = ("1", "1.58", "2", "3", "3-half-step", "4", "4-half-step", "8")
GROUPED = ("2-g2", "3-g5", "4-g8-s8", "2-g32", "1-g64", "8-g96-s8", "4-half-step-g256", "1.58-g512")
SCALED = ("2-row-s8", "4-tensor", "1.58-tensor", "8-row-s8")
TOLERANCE = {  # relative to sum |w x|
    torch.float32: 1e-6,  # sums of at most 512 products in float32
    torch.float16: 1e-3,  # the result is rounded to 11 bits, in 'dot' with groups also the weight
    torch.bfloat16: 8e-3,  # 8 bits
}


@dataclasses.dataclass
class Case:
    layer: PackedLinear
    weight: object
    dense: torch.Tensor  # float64, on the CPU


def make(spec, rows, cols, seed=0):
    spec, g = QuantSpec.parse(spec), torch.Generator().manual_seed(seed)
    layer = PackedLinear(spec, rows, cols)
    codes = torch.randint(0, spec.num_levels, (rows, cols), generator=g, dtype=torch.uint8)
    layer.weight.copy_(pack_codes(codes, spec.code_bits))
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=g) + 0.1)
    scales = layer.scales.double()
    if spec.scale_bits == 8:
        layer.scale_codes.copy_(torch.randint(1, 256, layer.scale_codes.shape, generator=g, dtype=torch.uint8))
        per = spec.num_groups(cols) if spec.granularity == "group" else rows
        scales = layer.scale_codes.double() * (scales / 256).repeat_interleave(per)
    found = expand_codes(layer.weight, spec.code_bits, rows * cols).view(rows, cols)
    group = torch.arange(cols) // (spec.group_size or cols)
    table = scales.expand(rows).view(rows, 1) if len(scales) == 1 else scales.view(rows, -1)
    dense = torch.tensor(spec.levels, dtype=torch.float64)[found.long()] * table[:, group]
    return Case(layer, repack_unit(layer, device=DEVICE), dense)


def activations(rows, cols, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=g).to(dtype).to(DEVICE)


def assert_product(y, x, case, bias=None, dtype=torch.float32):
    x = x.double().cpu()
    wanted, size = x @ case.dense.T, x.abs() @ case.dense.abs().T
    if bias is not None:
        wanted, size = wanted + bias.double().cpu(), size + bias.double().cpu().abs()
    assert y.dtype == dtype
    assert y.shape == wanted.shape
    assert ((y.double().cpu() - wanted).abs() <= TOLERANCE[dtype] * size + 1e-30).all()


@pytest.mark.parametrize("spec", GRIDS + GROUPED + SCALED)
def test_dequantized_matrix_is_the_packed_layers_bit_for_bit(spec):
    case = make(spec, 19, 259)
    found = run.dequantize(case.weight).cpu()
    assert torch.equal(found, case.layer.matrix())
    assert torch.equal(found, case.dense.float())


@pytest.mark.parametrize("spec", GRIDS)
def test_every_width_and_grid(spec):
    case, x, bias = make(spec, 21, 203), activations(2, 203), activations(1, 21)[0]
    assert_product(run.linear(x, case.weight, bias, kernel="gemv"), x, case, bias)
    assert_product(run.linear(x, case.weight, bias, kernel="dot"), x, case, bias)


@pytest.mark.parametrize("spec", GROUPED)
def test_every_kind_of_group(spec):
    """Groups of one lane and less, shared by a tile, crossing blocks, longer than the row; ragged last groups."""
    case, x = make(spec, 18, 269), activations(1, 269)
    assert_product(run.linear(x, case.weight, kernel="dot"), x, case)
    if spec in ("3-g5", "4-g8-s8", "8-g96-s8", "1.58-g512"):
        assert_product(run.linear(x, case.weight, kernel="gemv"), x, case)


@pytest.mark.parametrize("shape", [(1, 1), (1, 257), (67, 2), (16, 256), (33, 127)])
@pytest.mark.parametrize("kernel", ["gemv", "dot"])
def test_awkward_shapes(kernel, shape):
    case, x = make("3", *shape), activations(3, shape[1])
    assert_product(run.linear(x, case.weight, kernel=kernel), x, case)


@pytest.mark.parametrize("kernel", ["gemv", "dot", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kernel, dtype):
    case, x = make("4-g64", 17, 130), activations(3, 130, dtype)
    assert_product(run.linear(x, case.weight, kernel=kernel), x, case, dtype=dtype)


@pytest.mark.parametrize(("kernel", "rows"), [("gemv", 5), ("gemv", 16), ("dot", 17), ("dot", 70), ("dense", 33)])
def test_numbers_of_rows(kernel, rows):
    case, x = make("2", 20, 75), activations(rows, 75)
    assert_product(run.linear(x, case.weight, kernel=kernel), x, case)


def test_leading_dimensions_strides_and_empty_batches():
    case = make("2", 5, 9)
    x = activations(8, 9).T.contiguous().T.view(2, 2, 2, 9)[:, :, 1]  # columns apart, then rows apart
    assert torch.equal(run.linear(x, case.weight, kernel="dot"), run.linear(x.contiguous(), case.weight, kernel="dot"))
    strided = activations(4, 18)[:, 4:13]
    assert_product(run.linear(strided, case.weight, kernel="dot"), strided, case)
    assert run.linear(x[:0], case.weight).shape == (0, 2, 5)
    assert run.linear(x[0, 0], case.weight, kernel="dot").shape == (5,)


@pytest.mark.parametrize("name", ["gemv", "dot"])
def test_splits_of_columns_add_up_in_order(name):
    case, x, bias = make("1", 18, 3 * 256 + 5), activations(2, 3 * 256 + 5), activations(1, 18)[0]
    launch = Launch(name, block_m=16, block_n=16, splits=3)  # of four blocks: two splits of two
    first = run.linear(x, case.weight, bias, kernel=launch)
    assert_product(first, x, case, bias)
    if name == "dot":
        assert torch.equal(first, run.linear(x, case.weight, bias, kernel=launch))


@pytest.mark.parametrize("kernel", ["gemv", "dot"])
def test_nan_and_infinity_propagate_to_their_row_only(kernel):
    case, x = make("1.58", 17, 30), activations(4, 30)
    x[0, 7], x[1, 29], x[2, 0] = math.nan, math.inf, -math.inf
    found, wanted = run.linear(x, case.weight, kernel=kernel).cpu().double(), x.cpu().double() @ case.dense.T
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)  # infinities of the right sign too
    assert found[0].isnan().all()
    assert found[3].isfinite().all()


def test_rows_are_quantized_as_the_formula_says():
    x = activations(6, 1100)
    x[1], x[2, 3], x[3, 3], x[4] = 0, math.nan, math.inf, torch.arange(1100, device=DEVICE) % 255 - 127.0
    values, scales = (t.cpu() for t in run.quantize_rows(x))
    x = x.cpu()
    for row in (0, 1, 4, 5):
        scale = x[row].abs().max() / 127
        torch.testing.assert_close(scales[row], scale, rtol=1e-6, atol=0)
        assert (values[row].float() * scale - x[row]).abs().max() <= scale * 0.50001
    assert torch.equal(values[4].float(), x[4])
    assert scales[2:4].isnan().all()


@pytest.mark.parametrize("spec", ["2", "8", "4-half-step-tensor", "3-g32", "2-g64-s8", "1-g96", "1.58-g512"])
def test_int8_activations_are_exact_products_of_whole_numbers(spec):
    case, x = make(spec, 18, 290), activations(3, 290)
    values, scales = run.quantize_rows(x)
    quantized = values.double() * scales.double()[:, None]
    assert_product(run.linear(x, case.weight, activations="int8"), quantized, case)
    error = (run.linear(x, case.weight, activations="int8").cpu() - x.cpu().double() @ case.dense.T).norm()
    assert error < 0.02 * (x.cpu().double() @ case.dense.T).norm()


def test_int8_activations_that_are_not_finite_make_the_row_nan():
    case, x = make("2-g32", 4, 40), activations(3, 40)
    x[0, 0], x[1, 0] = math.nan, math.inf
    y = run.linear(x, case.weight, activations="int8").cpu()
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("spec", ["1", "1.58-g7", "3-g64-s8", "8"])
def test_embedding_is_a_row_of_the_matrix(spec):
    case = make(spec, 37, 300)
    ids = torch.tensor([[36, 0, 5], [5, 17, 35]], device=DEVICE)
    assert torch.equal(run.embedding(ids, case.weight).cpu(), case.layer.matrix()[ids.cpu()])
    half = run.embedding(ids.int(), case.weight, dtype=torch.float16).cpu()
    assert torch.equal(half, case.layer.matrix()[ids.cpu()].half())
    brain = run.embedding(ids, case.weight, dtype=torch.bfloat16).cpu()  # the interpreter cuts where a GPU rounds
    tolerance = 2**-7 if run.INTERPRETED else 0
    torch.testing.assert_close(brain, case.layer.matrix()[ids.cpu()].bfloat16(), rtol=tolerance, atol=0)
    assert run.embedding(ids[:, :0], case.weight).shape == (2, 0, 300)


@pytest.mark.parametrize("tiles", [(16, 16), (16, 64)])
@pytest.mark.parametrize("spec", ["2", "4-g64-s8"])
def test_log_sum_exp_and_targets(spec, tiles):
    """Several tiles of the vocabulary, the last one ragged, several splits; targets of any row, in any order."""
    case, x, bias = make(spec, 83, 140), activations(18, 140), activations(1, 83)[0]
    targets, sources = torch.tensor([82, 0, 0, 41, 7], device=DEVICE), torch.tensor([17, 17, 0, 3, 3], device=DEVICE)
    lse, logits = run.log_sum_exp(x, case.weight, targets, sources, bias=bias, tiles=tiles)
    wanted = x.cpu().double() @ case.dense.T + bias.cpu().double()
    torch.testing.assert_close(lse.cpu().double(), wanted.logsumexp(1), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(logits.cpu().double(), wanted[sources.cpu(), targets.cpu()], rtol=2e-6, atol=2e-5)


def test_log_sum_exp_within_one_split(monkeypatch):
    monkeypatch.setattr(run, "_LSE_PROGRAMS", 1)  # one program goes through all tiles, with a peak that moves
    case, x = make("8", 70, 33), activations(2, 33) * 3
    lse, logits = run.log_sum_exp(x, case.weight, torch.tensor([69, 3], device=DEVICE), tiles=(16, 16))
    wanted = x.cpu().double() @ case.dense.T
    torch.testing.assert_close(lse.cpu().double(), wanted.logsumexp(1), rtol=2e-6, atol=1e-4)
    assert (lse >= logits - 1e-3).all()


def test_log_sum_exp_of_one_word_and_of_no_rows():
    case, x = make("2", 1, 40), activations(2, 40)
    lse, logits = run.log_sum_exp(x, case.weight, torch.zeros(2, dtype=torch.int64, device=DEVICE))
    torch.testing.assert_close(lse, logits)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert [len(t) for t in run.log_sum_exp(x[:0], case.weight, none)] == [0, 0]
    assert [len(t) for t in run.log_sum_exp(x, case.weight, none, none)] == [2, 0]


def test_log_sum_exp_with_int8_activations_and_values_that_are_not_finite():
    case, x = make("2", 40, 70), activations(3, 70)
    x[1, 5] = math.nan
    targets = torch.tensor([1, 2, 39], device=DEVICE)
    values, scales = run.quantize_rows(x)
    lse, logits = run.log_sum_exp(x, case.weight, targets, activations="int8")
    wanted = (values.double() * scales.double()[:, None]).cpu() @ case.dense.T
    options = {"rtol": 2e-6, "atol": 2e-5, "equal_nan": True}
    torch.testing.assert_close(lse.cpu().double(), wanted.logsumexp(1), **options)
    torch.testing.assert_close(logits.cpu().double(), wanted[torch.arange(3), targets.cpu()], **options)
    assert lse[1].isnan()
    assert logits[1].isnan()


def test_infinite_bias_of_a_masked_word():
    case, x, bias = make("2", 20, 30), activations(2, 30), torch.zeros(20, device=DEVICE)
    bias[:16], bias[17] = -math.inf, -math.inf  # a whole tile, and a word of another
    lse, _ = run.log_sum_exp(x, case.weight, torch.tensor([16, 18], device=DEVICE), bias=bias, tiles=(16, 16))
    wanted = (x.cpu().double() @ case.dense.T + bias.cpu().double()).logsumexp(1)
    torch.testing.assert_close(lse.cpu().double(), wanted, rtol=2e-6, atol=2e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is not waited for: NaN instead, in the test below")
def test_indices_out_of_range_are_refused_on_a_cpu():
    case, x = make("2", 5, 9), activations(1, 9)
    with pytest.raises(IndexError, match=r"token id out of range: got -1 \.\. 5; there are 5 rows"):
        run.embedding(torch.tensor([-1, 5]), case.weight)
    with pytest.raises(IndexError, match="target"):
        run.log_sum_exp(x, case.weight, torch.tensor([5]))
    with pytest.raises(IndexError, match="source row"):
        run.log_sum_exp(x, case.weight, torch.tensor([4]), torch.tensor([1]))


def test_indices_out_of_range_give_nan_where_they_are_not_checked(monkeypatch):
    monkeypatch.setattr(run, "_check_index", lambda *_: None)
    case, x = make("2-g4", 5, 9), activations(1, 9)
    found = run.embedding(torch.tensor([-1, 4, 5, 1 << 40], device=DEVICE), case.weight)
    assert found.isnan().all(1).tolist() == [True, False, True, True]
    targets, sources = torch.tensor([5, 4, 4], device=DEVICE), torch.tensor([0, 0, -1], device=DEVICE)
    assert run.log_sum_exp(x, case.weight, targets, sources)[1].isnan().tolist() == [True, False, True]


def test_bad_input_is_refused():
    case = make("2-g5", 5, 9)
    x = activations(2, 9)
    for match, call in {
        r"expected \(\.\.\., 9\)": lambda: run.linear(x[:, :8], case.weight),
        "x has dtype torch.float64": lambda: run.linear(x.double(), case.weight),
        "bias is": lambda: run.linear(x, case.weight, x[0]),
        "unknown kernel 'fast'": lambda: run.linear(x, case.weight, kernel="fast"),
        "up to block_m and 16": lambda: run.linear(activations(17, 9), case.weight, kernel="gemv"),
        "no multiple of 32": lambda: run.linear(x, case.weight, activations="int8"),
        "expected 'float' or 'int8'": lambda: run.linear(x, case.weight, activations="int4"),
        "has no int8 activations": lambda: run.linear(x, make("2", 5, 9).weight, activations="int8", kernel="gemv"),
        "ids have dtype": lambda: run.embedding(x, case.weight),
        "dtype is torch.float64": lambda: run.dequantize(case.weight, dtype=torch.float64),
        "there are 1 targets and 2 source rows": lambda: run.log_sum_exp(
            x, case.weight, torch.tensor([0], device=DEVICE)
        ),
        r"expected \(rows, 9\)": lambda: run.log_sum_exp(x[0], case.weight, torch.tensor([0])),
    }.items():
        with pytest.raises(SpecError, match=match):
            call()
    with pytest.raises(SpecError, match="move them together"):
        run.linear(x.to("meta"), case.weight)


def test_without_gpu_or_interpreter_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(run, "INTERPRETED", False)
    case = make("2", 5, 9)
    with pytest.raises(KernelUnavailable, match="TRITON_INTERPRET=1"):
        run._check_device(case.weight.to("cpu"))


def test_measured_choice_is_kept_and_found_again(tmp_path, monkeypatch):
    """A made-up clock that likes one candidate; the file gives it back for the same shape and bucket only."""
    case, path = make("2", 40, 300), tmp_path / "gpu.json"
    wanted = Launch("dot", 16, 128, num_stages=3)

    def clock(call):
        launch = call.keywords["kernel"]
        if launch.kernel == "dense":
            raise RuntimeError("does not fit")
        return 1.0 if launch == wanted else 2.0

    best = dispatch.tune(case.weight, 3, cache=path, measure=clock)
    assert best == dataclasses.replace(wanted, measured=True)
    dispatch.tune(case.weight, 64, cache=path, measure=lambda call: -call.keywords["kernel"].block_n)
    known = dispatch._measurements(path)
    assert len(known) == 2
    assert known[dispatch._key(4, 40, 300, 2, 0, torch.bfloat16, case.weight.device)] == best
    assert dispatch._key(5, 40, 300, 2, 0, torch.bfloat16, case.weight.device) not in known
    with pytest.raises(SpecError, match="no kernel runs"):
        dispatch.tune(case.weight, 3, cache=path, measure=lambda call: 1 // 0)


@pytest.mark.parametrize(
    "text", ['{"format_version": 2}', '{"format_version": 1, "launches": {"a": {"kernel": "x"}}}', "[]"]
)
def test_damaged_file_of_measurements_is_named(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"gpu\.json.*delete it"):
        dispatch._measurements(path)
