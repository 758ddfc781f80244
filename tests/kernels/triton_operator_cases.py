"""PyTorch's operators and the drop-in layers on the GPU layout; run by test_triton.py and test_triton_gpu.py like triton_cases.py.

In Triton's interpreter the layers stay on the CPU and are given the layout; on a GPU the model is moved there.
"""

import os
import weakref

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from mixbits.errors import SpecError
from mixbits.hf import load
from mixbits.kernels import cpu, ops
from mixbits.kernels.triton import dispatch, run
from mixbits.kernels.triton.layout import GpuWeight, repack_unit
from mixbits.packing.bitpack import pack_codes
from mixbits.packing.checkpoint import save_packed
from mixbits.packing.kernel_layers import KernelLayer, KernelLinear, tune_kernels
from mixbits.packing.modules import PackedLinear
from mixbits.quant.grid import quantize_weight
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantSpec

DEVICE = os.environ.get("MIXBITS_TEST_DEVICE", "cpu")
if DEVICE == "cpu" and not run.INTERPRETED:
    pytest.skip("neither a GPU nor Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

FLOAT, INT8 = 2e-5, 0.03  # of the largest result; sums in another order, activations rounded to 1/127 of the largest
IDS = torch.tensor([[2, 5, 7, 1, 9], [3, 3, 0, 8, 4]])


def unit(spec, rows, cols):
    """A matrix in both layouts, and its float64 values."""
    spec, g = QuantSpec.parse(spec), torch.Generator().manual_seed(rows)
    layer = PackedLinear(spec, rows, cols)
    layer.weight.copy_(pack_codes(torch.randint(0, spec.num_levels, (rows, cols), generator=g, dtype=torch.uint8), spec.code_bits))  # fmt: skip
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=g) + 0.1)
    if spec.scale_bits == 8:
        layer.scale_codes.copy_(torch.randint(1, 256, layer.scale_codes.shape, generator=g, dtype=torch.uint8))
    plain = cpu.repack(layer.weight, layer.scale(), spec, rows, cols)
    return repack_unit(layer, device=DEVICE), plain, layer.matrix().double()


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", ["1.58", "2-g32", "4-half-step-g64-s8", "8"])
def test_operators_agree_with_the_cpus(spec):
    weight, plain, dense = unit(spec, 37, 130)
    x, bias = normal(2, 3, 130), normal(37)
    there, bias_there = x.to(DEVICE), bias.to(DEVICE)
    wanted = x.double() @ dense.T + bias.double()
    exact = ops.linear(there, weight, bias_there, activations="float32").cpu()
    assert (exact.double() - wanted).abs().max() < FLOAT * wanted.abs().max()
    rounded = ops.linear(there, weight, bias_there).cpu()
    torch.testing.assert_close(rounded, ops.linear(x, plain, bias), rtol=2e-6, atol=2e-5)
    assert torch.equal(torch.ops.mixbits.linear(there, *ops._numbers(weight), bias_there, 0).cpu(), rounded)
    assert ops.linear(there.double(), weight, bias_there.double()).dtype == torch.float64
    ids = torch.tensor([[36, 0], [5, 5]])
    for kind in (torch.int64, torch.uint8):
        assert torch.equal(ops.embedding(ids.to(DEVICE, kind), weight).cpu(), ops.embedding(ids, plain))
    assert ops.linear(there[:, :0], weight).shape == (2, 0, 37)
    strided = torch.stack([bias_there, bias_there], 1)[:, 0]
    assert torch.equal(ops.linear(there, weight, strided).cpu(), rounded)


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_log_softmax_agrees_with_the_cpus(activations):
    weight, plain, _ = unit("2-g32", 83, 70)
    x, bias = normal(5, 70) / 8, normal(83)
    offsets, targets = torch.tensor([0, 0, 3, 4, 4, 6]), torch.tensor([0, 41, 82, 7, 1, 2])
    moved = [t.to(DEVICE) for t in (x, offsets, targets, bias)]
    found = ops.log_softmax_at(moved[0], weight, *moved[1:], activations=activations)
    wanted = ops.log_softmax_at(x, plain, offsets, targets, bias, activations=activations)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=2e-6, atol=2e-5)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    empty = ops.log_softmax_at(moved[0][:0], weight, moved[1][:1], none)
    assert [t.shape for t in empty] == [(0,), (0,)]
    assert ops.log_softmax_at(moved[0].view(5, 1, 70), weight, moved[1], moved[2])[1].shape == (5, 1)
    for bad, match in (
        ((moved[0][:, :60], moved[1], moved[2]), r"expected \(\.\.\., 70\)"),
        ((moved[0], moved[1][:5], moved[2]), "offsets have shape"),
        ((moved[0][:0], moved[1][:1], moved[2]), "offsets have shape"),
        ((moved[0], moved[1].float(), moved[2]), "offsets are torch.float32"),
        ((moved[0], moved[1], moved[2][None]), "targets are torch.int64"),
    ):
        with pytest.raises(SpecError, match=match):
            ops.log_softmax_at(bad[0], weight, *bad[1:])


def test_autograd_is_refused_and_shapes_are_checked():
    weight, _, _ = unit("4-g8", 17, 20)
    x = normal(2, 20).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"mixbits::linear has no gradient.*torch\.no_grad"):
        ops.linear(x.clone().requires_grad_(), weight, activations="float32")
    with pytest.raises(SpecError, match=r"expected \(\.\.\., 20\)"):
        ops.linear(x[:, :19], weight)
    with pytest.raises(SpecError, match=r"x has dtype torch\.int64"):
        ops.linear(x.long(), weight)
    with pytest.raises(SpecError, match=r"group size 8 is no multiple of 32.*kernels='float32'"):
        ops.linear(x, weight)
    with pytest.raises(SpecError, match="ids have dtype"):
        ops.embedding(x, weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, dtype=torch.int32)}, "packed is torch.int32"),
        ({1: torch.zeros(3)}, "scales is torch.float32"),
        ({1: torch.zeros(32, dtype=torch.float16)}, "scales is torch.float16"),
        ({2: None}, "no group_scales"),
        ({2: torch.zeros(2, 32)}, "group_scales is torch.float32"),
        ({3: 0}, "no such matrix"),
        ({3: 2**40}, "packed is"),
        ({4: 300}, "packed is"),
        ({5: 7}, "group_scales is"),
        ({5: -1}, "no such matrix"),
        ({6: 5}, "no such matrix"),
        ({6: 8}, "packed is"),
    ],
)
def test_numbers_that_do_not_belong_to_the_tensors(change, message):
    arguments = list(ops._numbers(unit("2-g10", 17, 20)[0]))
    for place, value in change.items():
        arguments[place] = value.to(DEVICE) if isinstance(value, torch.Tensor) else value
    with pytest.raises(SpecError, match=message):
        torch.ops.mixbits.linear(normal(2, 20).to(DEVICE), *arguments, None, 1)


def test_tensors_on_two_devices_are_refused():
    words, scales, *others = ops._numbers(unit("2-g10", 17, 20)[0])
    with pytest.raises(SpecError, match="scales is on meta"):
        ops._matrix(words, scales.to("meta"), *others)
    with pytest.raises(SpecError, match="move them together"):
        ops._linear(normal(2, 20).to("meta"), words, scales, *others, None, 1)


def test_opcheck_and_one_graph():
    weight, _, _ = unit("3-g32", 17, 40)
    x, arguments = normal(2, 40).to(DEVICE), ops._numbers(weight)
    offsets, targets = torch.tensor([0, 1, 2], device=DEVICE), torch.tensor([3, 16], device=DEVICE)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    for call, given in (
        (torch.ops.mixbits.linear, (x, *arguments, None, 1)),
        (torch.ops.mixbits.embedding, (targets, *arguments)),
        (torch.ops.mixbits.log_softmax_at, (x, *arguments, None, offsets, targets, 0)),
    ):
        torch.library.opcheck(call, given, test_utils=utilities)
    compiled = torch.compile(lambda t: torch.relu(ops.linear(t, weight)) * 2, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.relu(ops.linear(x, weight)) * 2)


def opt():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 21, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=23, num_hidden_layers=1, max_position_embeddings=12, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=12, n_embd=16, n_layer=1, n_head=2))


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, max_position_embeddings=12, **sizes))


def saved(family, folder, specs=("2", "1.58", "8-row-s8", "3", "4-g32")):
    torch.manual_seed(3)
    model = family().eval()
    inventory = find_units(model)
    chosen = {u.name: QuantSpec.parse(specs[i % len(specs)]) for i, u in enumerate(inventory.units)}
    matrices = unit_matrices(model, inventory)
    weights = {name: quantize_weight(matrices[name], spec) for name, spec in chosen.items()}
    save_packed(model, inventory, BitAllocation(chosen), weights, folder)
    return folder


def moved(model):
    """To the GPU; in the interpreter only the layouts."""
    if DEVICE != "cpu":
        return model.to(DEVICE)
    made = {}
    for layer in model.modules():
        if isinstance(layer, KernelLayer):
            layer.matrix = made.setdefault(id(layer.codes), repack_unit(layer.codes.unit))
    return model


@pytest.mark.parametrize("family", [opt, gpt2, llama])
def test_models_have_the_logits_of_pytorch(family, tmp_path):
    folder = saved(family, tmp_path / "model")
    ids = IDS.to(DEVICE)
    with torch.no_grad():
        wanted = load(folder)(IDS).logits
        for activations, tolerance in (("float32", FLOAT), ("int8", INT8)):
            model = moved(load(folder, kernels=activations))
            layers = [m for m in model.modules() if isinstance(m, KernelLayer)]
            assert layers
            assert all(isinstance(m.matrix, GpuWeight) for m in layers)
            found = model(ids).logits.cpu()
            assert (found - wanted).abs().max() < tolerance * wanted.abs().max()
        half = moved(load(folder, kernels="float32", dtype=torch.bfloat16))(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half.float().cpu() - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert len({id(m.matrix) for m in layers}) == len({id(m.codes) for m in layers})  # ties share


def test_a_layer_is_traced_in_one_graph(tmp_path):
    model = moved(load(saved(llama, tmp_path / "model"), kernels="float32"))
    layer = next(m for m in model.modules() if isinstance(m, KernelLinear))
    x = normal(3, layer.in_features).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_measured_kernels_are_those_of_the_models_layers(tmp_path):
    cache = tmp_path / "gpu.json"
    model = moved(load(saved(opt, tmp_path / "model", ("2", "4")), kernels="float32"))
    kinds = {(m.matrix.rows, m.matrix.cols, m.matrix.bits) for m in model.modules() if isinstance(m, KernelLinear)}
    clock = lambda call: float(call.keywords["kernel"].kernel != "dense")  # noqa: E731
    assert tune_kernels(model, (1, 40), cache=cache, measure=clock) == 2 * len(kinds)
    known = dispatch._measurements(cache)
    assert len(known) == 2 * len(kinds)
    assert {launch.kernel for launch in known.values()} == {"dense"}
    for empty in (moved(load(tmp_path / "model", kernels="int8")), load(tmp_path / "model")):
        with pytest.raises(SpecError, match="no layer to measure"):
            tune_kernels(empty, cache=cache)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_there_and_back_again(tmp_path):
    """A layout is made for the device that the model is on, and given up when it leaves."""
    model = load(saved(llama, tmp_path / "model"), kernels="float32")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before, wanted = model(IDS).logits, model.generate(IDS[:1], **options)
        on_gpu = model.to(DEVICE)(IDS.to(DEVICE)).logits.cpu()
        assert (on_gpu - before).abs().max() < FLOAT * before.abs().max()
        assert model.generate(IDS[:1].to(DEVICE), **options).cpu().equal(wanted)
        layouts = [weakref.ref(m.matrix) for m in model.modules() if isinstance(m, KernelLayer)]
        assert torch.equal(model.to("cpu")(IDS).logits, before)
    assert all(layout() is None for layout in layouts)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_layer_on_a_gpu_compiles_to_code(tmp_path):
    model = load(saved(llama, tmp_path / "model"), kernels="float32").to(DEVICE)
    layer = next(m for m in model.modules() if isinstance(m, KernelLinear))
    x = normal(3, layer.in_features).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(torch.compile(lambda t: torch.relu(layer(t)), fullgraph=True)(x), torch.relu(layer(x)))
