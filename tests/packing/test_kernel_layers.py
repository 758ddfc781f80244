"""Drop-in layers on the compiled kernels against the packed layers in PyTorch, for each family and kind of layer."""

import subprocess
import sys
import types
import weakref

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mixbits.errors import KernelUnavailable, SpecError
from mixbits.hf import load
from mixbits.kernels import cpu
from mixbits.kernels.triton.layout import GpuWeight, repack_unit
from mixbits.packing import kernel_layers
from mixbits.packing.checkpoint import save_packed
from mixbits.packing.kernel_layers import KernelEmbedding, KernelLayer, KernelLinear, KernelOPTPositions, use_kernels
from mixbits.packing.modules import PackedUnit
from mixbits.quant.grid import quantize_weight
from mixbits.quant.units import find_units, unit_matrices
from mixbits.spec import BitAllocation, QuantSpec

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the compiled kernels are not built")

FLOAT_TOLERANCE = 2e-5  # float32 sums in another order
INT8_TOLERANCE = 0.03  # of the logits' range: activations rounded to 1/127 of the largest in each of a few layers
IDS = torch.tensor([[2, 5, 7, 1, 9], [3, 3, 0, 8, 4]])


def saved(model, folder, specs=("2", "4-g8", "1.58", "8-row-s8", "3")):
    inventory = find_units(model)
    chosen = {u.name: QuantSpec.parse(specs[i % len(specs)]) for i, u in enumerate(inventory.units)}
    matrices = unit_matrices(model, inventory)
    weights = {name: quantize_weight(matrices[name], spec) for name, spec in chosen.items()}
    save_packed(model, inventory, BitAllocation(chosen), weights, folder)
    return folder


def gpt2():
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=12, n_embd=16, n_layer=2, n_head=2)).eval()


def llama():
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=23, max_position_embeddings=12, **sizes)).eval()


@pytest.fixture(params=["opt", "gpt2", "llama"])
def directory(request, tmp_path):
    if request.param == "opt":
        request.getfixturevalue("job").save(tmp_path / "model")
        return tmp_path / "model"
    return saved(gpt2() if request.param == "gpt2" else llama(), tmp_path / "model")


def test_same_logits_as_pytorch(directory):
    with torch.no_grad():
        expected = load(directory)(IDS).logits
        exact = load(directory, kernels="float32")(IDS).logits
        rounded = load(directory, kernels="int8")(IDS).logits
    assert (exact - expected).abs().max() < FLOAT_TOLERANCE * expected.abs().max()
    assert 0 < (rounded - expected).abs().max() < INT8_TOLERANCE * (expected.max() - expected.min())


def test_every_packed_layer_is_replaced_and_ties_share(packed):
    before, model = load(packed), load(packed, kernels="int8")
    assert not any(isinstance(m, PackedUnit) for m in model.modules())
    num_layers = sum(isinstance(m, KernelLayer) for m in model.modules())
    assert num_layers == sum(isinstance(m, PackedUnit) for m in before.modules())
    decoder = model.model.decoder
    assert type(decoder.embed_positions) is KernelOPTPositions
    assert type(decoder.embed_tokens) is KernelEmbedding
    assert type(model.lm_head) is KernelLinear
    assert model.lm_head.matrix.packed.data_ptr() == decoder.embed_tokens.matrix.packed.data_ptr()


def test_generation_with_a_cache_is_that_of_pytorch(packed):
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = load(packed).generate(IDS[:1], **options)
    assert load(packed, kernels="float32").generate(IDS[:1], **options).equal(expected)


def test_bfloat16_activations_stay_bfloat16(packed):
    model = load(packed, dtype=torch.bfloat16, kernels="int8")
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits).all())


def test_product_units_stay_in_pytorch(tmp_path):
    directory = saved(llama(), tmp_path / "model", ("1-product-v8", "2"))
    model = load(directory, kernels="float32")
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, (PackedUnit, KernelLayer))}
    assert {"KernelLinear", "PackedEmbedding"} <= kinds
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, load(directory)(IDS).logits, atol=1e-4)


def test_parameters_are_frozen_so_that_no_grad_is_not_needed(packed):
    assert not load(packed, kernels="int8")(IDS).logits.requires_grad


def test_a_model_with_kernels_cannot_be_saved(packed, tmp_path):
    model = load(packed, kernels="int8")
    with pytest.raises(SpecError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_moving_says_so_and_changes_nothing(packed):
    model = load(packed, kernels="int8")
    expected = model(IDS).logits
    with pytest.raises(KernelUnavailable, match=r"PyTorch sees no CUDA device here \(.*\); leave the model on the CPU"):
        model.to("cuda")
    assert torch.equal(model.to("cpu")(IDS).logits, expected)


class Elsewhere(torch.Tensor):
    """Says that it lies on another device."""

    where = "cuda:0"
    device = property(lambda self: torch.device(self.where))


class OnXpu(Elsewhere):
    where = "xpu:0"


def test_layouts_follow_the_device(packed, monkeypatch):
    """With a GPU that is made up: tied layers share its layout, which is given up on return. With a real one: triton_operator_cases.py."""
    made = []
    monkeypatch.setattr(kernel_layers, "repack_unit", lambda unit, device: made.append(device) or repack_unit(unit))
    monkeypatch.setitem(sys.modules, "mixbits.kernels.triton.run", types.ModuleType("run"))
    model = load(packed, kernels="int8")
    table, head = model.model.decoder.embed_tokens, model.lm_head
    on_cpu = weakref.ref(table.matrix)
    for layer in (table, head):
        layer._apply(lambda tensor: tensor.as_subclass(Elsewhere))
    assert isinstance(table.matrix, GpuWeight)
    assert table.matrix is head.matrix
    assert made == [torch.device("cuda:0")]
    assert on_cpu() is None
    on_gpu = weakref.ref(head.matrix)
    with pytest.raises(SpecError, match="no kernels for xpu:0"):
        head._apply(lambda tensor: tensor.as_subclass(OnXpu))
    for layer in (table, head):
        layer._apply(lambda tensor: tensor.as_subclass(torch.Tensor))
    assert on_gpu() is None
    assert table.matrix is head.matrix
    assert torch.equal(model(IDS).logits, load(packed, kernels="int8")(IDS).logits)


def test_a_gpu_needs_triton(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mixbits.kernels.triton.run", raising=False)
    monkeypatch.delattr("mixbits.kernels.triton.run", raising=False)
    with pytest.raises(KernelUnavailable, match=r"need Triton.*pip install 'mixbits\[gpu\]'"):
        load(packed, kernels="int8").lm_head._apply(lambda tensor: tensor.as_subclass(Elsewhere))


def test_unknown_activations_are_refused(packed):
    with pytest.raises(SpecError, match="int8 or float32"):
        load(packed, kernels="int4")
    with pytest.raises(SpecError, match="int8 or float32"):
        use_kernels(load(packed), "fast")  # type: ignore[arg-type]


def test_without_the_library_pytorch_does_it_and_says_so_once(packed):
    code = (
        "import sys, warnings, torch\n"
        "from mixbits.hf import load\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    models = [load(sys.argv[1], kernels='int8') for _ in range(2)]\n"
        "print(type(models[0].lm_head).__name__, sum('compiled kernels' in str(w.message) for w in seen))\n"
    )
    import os

    environment = {**os.environ, "MIXBITS_LIBRARY": str(packed / "none.so")}
    done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["PackedLinear", "1"], done.stderr
