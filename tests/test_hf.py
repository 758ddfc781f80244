"""Packed models inside transformers, against the same model with fake-quantized weights, on five families.

Oracle: the transformers model whose unit weights are ``dequantize(quantize_weight(...))`` and whose other tensors are rounded to
float16. In float32 both compute the very same matrix products, so logits must agree bit for bit.
"""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import mixbits
import mixbits.hf
from mixbits.errors import DataError, FormatError, MixbitsError, SpecError
from mixbits.packing.checkpoint import save_packed
from mixbits.packing.modules import PackedEmbedding, PackedLinear, PackedUnit
from mixbits.packing.weightfile import read_weight_file, write_weight_file
from mixbits.quant.grid import dequantize, quantize_weight
from mixbits.quant.units import find_units, unit_matrices, unit_parameters
from mixbits.spec import BitAllocation, QuantSpec, predicted_bytes

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECS = [QuantSpec(1), QuantSpec(1.58), QuantSpec(2), QuantSpec(3), QuantSpec(4), QuantSpec(8), QuantSpec(16)]
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _opt(**kwargs):
    sizes = {"ffn_dim": 52, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=32, word_embed_proj_dim=32, **sizes, **SPECIAL, **kwargs)
    )


BUILDERS = {
    "opt-pre": lambda: _opt(),
    "opt-post": lambda: _opt(do_layer_norm_before=False),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, **SPECIAL, tie_word_embeddings=True)),
    "llama-untied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, **SPECIAL, tie_word_embeddings=False)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPECIAL)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8, **SPECIAL, tie_word_embeddings=True)),
    # a tied output layer that has a bias of its own
    "phi-tied": lambda: PhiForCausalLM(
        PhiConfig(**{**LLAMA, "num_key_value_heads": 4}, **SPECIAL, tie_word_embeddings=True)
    ),
}


def build(name: str):
    """A random model with every parameter away from its initial zeros and ones."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def fake_and_packed(model, allocation, directory, **kwargs):
    """Save ``model`` packed; return its fake-quantized twin and what save_packed returned."""
    inventory = find_units(model)
    specs = {name: spec for name, spec in allocation.specs.items() if spec.is_quantized}
    matrices = unit_matrices(model, inventory)
    weights = {name: quantize_weight(matrices[name], spec) for name, spec in specs.items()}
    saved = save_packed(model, inventory, allocation, weights, directory, **kwargs)
    fake = copy.deepcopy(model)
    units = unit_parameters(fake, inventory)
    packed_ids = {id(units[name]) for name in weights}
    with torch.no_grad():
        for parameter in fake.parameters():
            if id(parameter) not in packed_ids:
                parameter.copy_(parameter.half().float())
        for unit in inventory.units:
            if unit.name in weights:
                dense = dequantize(weights[unit.name])
                units[unit.name].copy_(dense.T if unit.kind == "conv1d" else dense)
    return fake, saved


def mixed(model, granularity="row"):
    """Every bit width in turn, 16-bit units included."""
    inventory = find_units(model)
    specs = {}
    for i, unit in enumerate(inventory.units):
        spec = SPECS[i % len(SPECS)]
        specs[unit.name] = spec if not spec.is_quantized else QuantSpec(spec.bit_width, spec.grid, granularity)
    return BitAllocation(specs)


FORMATS = ["0.5-v16", "2-g8-s8", "1-v8-tensor", "1.58-row-s8", "4-g24", "2-g5-s8", "1.58-g64"]


def formats(model):
    """The embedding as a product, group and byte scales and codebooks in turn for the rest."""
    units = find_units(model).units
    return BitAllocation({u.name: QuantSpec.parse(FORMATS[i % len(FORMATS)]) for i, u in enumerate(units)})


def ids(rows=3, length=11):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(5))


def logits(model, tokens=None):
    with torch.no_grad():
        return model(tokens if tokens is not None else ids()).logits


@pytest.fixture
def small(tmp_path):
    """A tied OPT at two bits: (directory, fake-quantized twin)."""
    model = build("opt-pre")
    fake, _ = fake_and_packed(model, BitAllocation.uniform(find_units(model), QuantSpec(2)), tmp_path / "m")
    return tmp_path / "m", fake


@pytest.mark.parametrize("choose", [mixed, formats])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_mixed_bits_logits_equal_the_fake_quantized_model(name, choose, tmp_path):
    model = build(name)
    allocation = choose(model)
    fake, saved = fake_and_packed(model, allocation, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    assert saved.file_bytes == os.path.getsize(path) == predicted_bytes(find_units(model), allocation)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert not packed.training
    assert type(packed) is type(model)
    assert packed.dtype == torch.float32
    assert torch.equal(logits(packed), logits(fake))
    for long_or_short in (ids(1, 1), ids(2, 50)):  # an embedding that looks up few rows, and one that unpacks all
        assert torch.equal(logits(packed, long_or_short), logits(fake, long_or_short))


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(3, "half-step"), QuantSpec(4, "half-step")], ids=str)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_every_spec_uniform(spec, granularity, tmp_path):
    model = build("opt-post")
    spec = QuantSpec(spec.bit_width, spec.grid, granularity)
    fake, saved = fake_and_packed(model, BitAllocation.uniform(find_units(model), spec), tmp_path / "m")
    assert saved.file_bytes == os.path.getsize(tmp_path / "m" / "model.safetensors")
    packed = mixbits.load(tmp_path / "m")
    assert torch.equal(logits(packed), logits(fake))
    few = ids(1, 2)
    assert torch.equal(logits(packed, few), logits(fake, few))


@pytest.mark.parametrize("name", list(BUILDERS))
def test_bfloat16_load_uses_exact_scales(name, tmp_path):
    model = build(name)
    fake, _ = fake_and_packed(model, mixed(model, "tensor"), tmp_path / "m")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    for module in packed.modules():
        if isinstance(module, PackedUnit) and module.storage is module:
            assert (module.scales.dtype, module.weight.dtype) == (torch.float16, torch.uint8)
    fake.save_pretrained(tmp_path / "fake")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "fake", dtype=torch.bfloat16))
    assert logits(packed).dtype == torch.bfloat16
    assert torch.equal(logits(packed), expected)
    # casting afterwards also casts rotary frequencies, in both models alike
    cast_later = AutoModelForCausalLM.from_pretrained(tmp_path / "m").to(torch.bfloat16)
    assert torch.equal(logits(cast_later), logits(fake.to(torch.bfloat16)))


def test_casting_there_and_back_loses_no_scale_bits(small):
    directory, fake = small
    packed = mixbits.load(directory)
    table = packed.model.decoder.embed_tokens
    before = table.scales.clone()
    packed.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(table.scales, before)
    assert torch.equal(table.matrix(), fake.model.decoder.embed_tokens.weight)
    assert table(ids()).dtype == torch.float32
    with pytest.raises(SpecError, match="cannot be cast"):
        table.type(torch.float64)


def test_ties_take_their_bytes_once(small, tmp_path):
    directory, _ = small
    packed = mixbits.load(directory)
    table, head = packed.get_input_embeddings(), packed.get_output_embeddings()
    assert isinstance(table, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert head.storage is table
    assert not list(head.buffers())[1:]  # nothing but the empty dtype marker
    assert "lm_head.weight" not in packed.state_dict()
    packed.tie_weights()  # transformers may do this at any time
    assert head.storage is table
    twin = copy.deepcopy(packed)
    assert twin.lm_head.storage is twin.model.decoder.embed_tokens
    assert twin.lm_head.storage is not table
    names = [t.name for t in read_weight_file(directory / "model.safetensors").tensors]
    assert "model.decoder.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("name", list(BUILDERS))
def test_save_pretrained_round_trip(name, tmp_path):
    model = build(name)
    fake_and_packed(model, mixed(model), tmp_path / "a")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(first), logits(second))
    one, two = (json.loads((tmp_path / d / "config.json").read_text()) for d in "ab")
    assert one == two
    copy.deepcopy(second).save_pretrained(tmp_path / "c")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["opt-pre", "gpt2"])
def test_shards_load_and_are_saved(name, tmp_path):
    model = build(name)
    fake, saved = fake_and_packed(model, mixed(model), tmp_path / "a", max_shard_bytes=3000)
    assert saved.file_bytes == sum(p.stat().st_size for p in (tmp_path / "a").glob("model-*.safetensors"))
    for load in (mixbits.load, AutoModelForCausalLM.from_pretrained):
        packed = load(tmp_path / "a")
        assert torch.equal(logits(packed), logits(fake))
    packed.save_pretrained(tmp_path / "b", max_shard_size="3KB")
    names = sorted(os.listdir(tmp_path / "a" / ""))
    for file in sorted(os.listdir(tmp_path / "b")):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert set(names) - set(os.listdir(tmp_path / "b")) == {"README.md"}
    packed.save_pretrained(tmp_path / "b")  # over the files its own tensors are mapped from, in another split
    assert torch.equal(logits(packed), logits(fake))
    assert [p.name for p in (tmp_path / "b").glob("model*")] == ["model.safetensors"]
    quantization = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    size = os.path.getsize(tmp_path / "b/model.safetensors")
    assert quantization["file_bytes"] == size < saved.file_bytes
    assert quantization["compression_ratio"] == round(4 * quantization["num_parameters"] / size, 4)
    assert quantization["bits_per_weight"] == round(8 * size / quantization["num_parameters"], 4)
    assert torch.equal(logits(mixbits.load(tmp_path / "b")), logits(fake))
    for bad in ("5 bananas", "0", -1):
        with pytest.raises(SpecError, match="max_shard"):
            packed.save_pretrained(tmp_path / "c", max_shard_size=bad)


def test_a_missing_shard_is_named(tmp_path):
    fake_and_packed(model := build("opt-pre"), mixed(model), tmp_path / "a", max_shard_bytes=3000)
    gone = sorted((tmp_path / "a").glob("model-*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(DataError, match="no such file"):
        mixbits.load(tmp_path / "a")


def test_packed_weights_stay_in_the_memory_map(small):
    """Nothing is copied on loading: the codes' memory belongs to a mapping of the weight file."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("the test reads Linux's list of mappings")
    packed = mixbits.load(small[0])
    address = packed.model.decoder.embed_tokens.weight.data_ptr()
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps if "model.safetensors" in line]
    assert any(int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16) for r in ranges)


def test_check_model_builds_without_weights(small):
    from mixbits.hf import check_model
    from mixbits.packing.verify import verify_packed

    directory, _ = small
    assert check_model(directory, *verify_packed(directory)) == "OPTForCausalLM"
    _edit_config(directory, lambda q: q["units"][EMBED].update(tied=["lm_haed"]))
    with pytest.raises(FormatError, match="'lm_haed' is not a Linear"):
        check_model(directory, *verify_packed(directory))
    config = json.loads((directory / "config.json").read_text())
    for change in ({"num_attention_heads": 0}, {"model_type": "nothing"}, {"hidden_size": "wide"}):
        (directory / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FormatError, match=r"config\.json: transformers cannot build"):
            check_model(directory, *verify_packed(directory))


def test_save_pretrained_of_a_bfloat16_model(tmp_path):
    model = build("qwen3")
    fake_and_packed(model, mixed(model), tmp_path / "a")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    first.save_pretrained(tmp_path / "b")
    assert os.path.getsize(tmp_path / "a/model.safetensors") == os.path.getsize(tmp_path / "b/model.safetensors")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert second.dtype == torch.bfloat16
    assert torch.equal(logits(first), logits(second))


def test_save_pretrained_keeps_a_changed_bias_and_refuses_uploads(small, tmp_path):
    packed = mixbits.load(small[0])
    with torch.no_grad():
        packed.model.decoder.layers[0].fc1.bias.fill_(0.25)
    packed.save_pretrained(tmp_path / "b")
    again = mixbits.load(tmp_path / "b")
    assert torch.equal(logits(packed), logits(again))
    with pytest.raises(SpecError, match="not uploaded"):
        packed.save_pretrained(tmp_path / "c", push_to_hub=True)
    with torch.no_grad():
        packed.model.decoder.layers[0].fc1.bias.fill_(1e6)
    with pytest.raises(DataError, match=r"fc1\.bias: 1e\+06 does not fit float16"):
        packed.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(again), logits(mixbits.load(tmp_path / "b")))  # the old file is still whole


def test_codebooks_and_byte_scales_survive_casts_saving_and_masks(tmp_path):
    model = build("opt-pre")
    fake, _ = fake_and_packed(model, formats(model), tmp_path / "m")
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert all(module.is_intact() for module in cast.modules() if isinstance(module, PackedUnit))
    assert torch.equal(cast.to(torch.float32).lm_head.matrix(), fake.lm_head.weight)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    packed.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4], mask[1, 9:] = 0, 0
    with torch.no_grad():
        found = packed(ids(), attention_mask=mask).logits
        assert torch.equal(found, fake(ids(), attention_mask=mask).logits)
        positions = torch.arange(11).expand(3, 11) + 5
        assert torch.equal(packed(ids(), position_ids=positions).logits, fake(ids(), position_ids=positions).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(packed.generate(ids(), **options), fake.generate(ids(), **options))
    mixbits.hf.set_weight_cache(packed)
    assert torch.equal(logits(packed), logits(fake))


@pytest.mark.parametrize("name", ["opt-post", "llama-tied", "gpt2", "qwen3"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_the_fake_quantized_model(name, use_cache, tmp_path):
    model = build(name)
    fake, _ = fake_and_packed(model, mixed(model), tmp_path / "m")
    packed = mixbits.load(tmp_path / "m")
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "use_cache": use_cache}
    mask = torch.ones_like(ids())
    expected = fake.generate(ids(), attention_mask=mask, **settings)
    assert expected.shape == (3, 23)
    assert torch.equal(packed.generate(ids(), attention_mask=mask, **settings), expected)


@pytest.mark.parametrize("name", ["opt-pre", "gpt2", "phi-tied"])
def test_weight_cache_changes_nothing_but_time(name, tmp_path):
    model = build(name)
    fake, _ = fake_and_packed(model, mixed(model), tmp_path / "m")
    packed = mixbits.load(tmp_path / "m", cache_weights=True)
    with torch.inference_mode():
        assert torch.equal(packed(ids()).logits, fake(ids()).logits)
    assert torch.equal(packed(ids(1, 2)).logits, fake(ids(1, 2)).logits)  # the kept matrices meet autograd
    held = {id(m.storage._kept) for m in packed.modules() if isinstance(m, PackedUnit)}
    assert len(held) == sum(isinstance(m, PackedUnit) and m.storage is m for m in packed.modules())
    assert torch.equal(logits(packed.to(torch.bfloat16)), logits(fake.to(torch.bfloat16)))
    assert all("kept" not in name for name in packed.state_dict())


def test_biases_have_gradients_and_codes_do_not(small):
    packed = mixbits.load(small[0])
    packed(ids(), labels=ids()).loss.backward()
    assert packed.model.decoder.layers[0].fc1.bias.grad is not None
    assert not any(name.endswith(("k_proj.weight", "scales")) for name, _ in packed.named_parameters())


def test_embedding_refuses_ids_out_of_range(small):
    table = mixbits.load(small[0]).get_input_embeddings()
    for bad in (50, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([[bad]]))
    assert table(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 32)


def test_without_mixbits_loading_raises(tmp_path):
    """A single packed unit, of any width, is enough: transformers must never go on with random weights."""
    model = build("llama-untied")
    directories = []
    for bits in (1, 1.58, 2, 3, 4, 8):
        specs = {u.name: QuantSpec(16) for u in find_units(model).units}
        specs["model.layers.0.self_attn.q_proj"] = QuantSpec(bits)
        fake_and_packed(model, BitAllocation(specs), tmp_path / f"m{bits}")
        directories.append(str(tmp_path / f"m{bits}"))
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        f"for directory in {directories!r}:\n"
        "    try:\n        AutoModelForCausalLM.from_pretrained(directory)\n"
        "    except Exception as error:\n        print('raised', type(error).__name__)\n"
        "assert not any(name.startswith('mixbits') for name in sys.modules)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["raised RuntimeError"] * len(directories), done.stdout + done.stderr


def test_importing_mixbits_is_light():
    code = "import mixbits, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules; print(dir(mixbits))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'load'" in done.stdout
    with pytest.raises(AttributeError, match="lod"):
        mixbits.lod  # noqa: B018


def _edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


EMBED = "model.decoder.embed_tokens"


def _rename_unit(q, old, new):
    q["units"][new] = q["units"].pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["units"][EMBED].update(tied=["lm_haed"]), r"config\.json.*'lm_haed' is not a Linear"),
        (lambda q: q["units"][EMBED].update(tied=["model.decoder"]), r"'model\.decoder' is not a Linear"),
        (lambda q: q["units"][EMBED].update(tied=[]), "ties lm_head.weight.*lists as tied: nothing"),
        (lambda q: q["units"][EMBED].update(tied=["model.decoder.layers.0.fc1"]), "also another unit"),
        (lambda q: q["units"][EMBED].update(kind="linear"), "kind says 'linear'"),
        (lambda q: q["units"][EMBED].update(rows=51), r"embed_tokens\.weight': shape is"),
        (lambda q: q["units"][EMBED].update(rows=32, cols=50), r"embed_tokens\.scales': shape is \(50,\)"),
        (lambda q: q.update(format_version=3), "format_version is 3"),
        (lambda q: q.update(units={}), "units is missing"),
        (lambda q: _rename_unit(q, EMBED, EMBED + "2"), "embed_tokens2.weight' is missing"),
        (lambda q: q["units"].pop(EMBED), r"embed_tokens\.weight' is U8 but no unit"),
    ],
)
def test_config_that_does_not_fit_is_refused(change, message, small):
    directory, _ = small
    _edit_config(directory, change)
    with pytest.raises(FormatError, match=message):
        mixbits.load(directory)
    with pytest.raises(FormatError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


def _rewrite(directory, rename=None, drop=(), add=None):
    """Write the weight file again with other tensors, header and sizes consistent, and without checksums (version 1)."""
    _edit_config(directory, lambda q: q.update(format_version=1))
    parsed = read_weight_file(directory / "model.safetensors")
    rename = rename or {}
    reader = parsed.reader()
    stored = [t for t in parsed.tensors if t.name not in drop]
    tensors = {rename.get(t.name, t.name): reader.tensor(t) for t in stored}
    new = [type(t)(rename.get(t.name, t.name), t.dtype, t.shape) for t in stored]
    for entry, tensor in (add or {}).items():
        new.append(entry)
        tensors[entry.name] = tensor
    write_weight_file(directory / "model.safetensors", new, tensors)


def test_wrong_layer_name_in_file_and_config(small):
    directory, _ = small
    old, new = "model.decoder.layers.1.fc1", "model.decoder.layers.7.fc1"
    _rewrite(directory, rename={f"{old}.{leaf}": f"{new}.{leaf}" for leaf in ("weight", "scales")})
    _edit_config(directory, lambda q: _rename_unit(q, old, new))
    with pytest.raises(FormatError, match=r"config\.json: unit 'model\.decoder\.layers\.7\.fc1' is not a Linear"):
        mixbits.load(directory)


def test_missing_and_extra_float_tensors(small):
    from mixbits.spec import StoredTensor

    directory, _ = small
    shutil.copytree(directory, directory.with_name("m2"))
    _rewrite(directory, drop=["model.decoder.layers.1.fc1.bias"])
    with pytest.raises(
        FormatError, match=r"model\.safetensors: tensor 'model\.decoder\.layers\.1\.fc1\.bias' of OPT.* is missing"
    ):
        mixbits.load(directory)
    extra = StoredTensor("model.decoder.layers.9.bias", "F16", (2,))
    _rewrite(directory.with_name("m2"), add={extra: torch.zeros(2, dtype=torch.float16)})
    with pytest.raises(FormatError, match=r"tensor 'model\.decoder\.layers\.9\.bias' is not part of OPTForCausalLM"):
        mixbits.load(directory.with_name("m2"))


def test_float_tensor_of_another_shape(small):
    from mixbits.spec import StoredTensor

    directory, _ = small
    name = "model.decoder.layers.1.fc1.bias"
    _rewrite(directory, drop=[name], add={StoredTensor(name, "F16", (3,)): torch.zeros(3, dtype=torch.float16)})
    with pytest.raises(FormatError, match=r"fc1\.bias': shape is \(3,\); OPTForCausalLM has \(52,\)"):
        mixbits.load(directory)


def test_base_model_class_is_refused_clearly(small):
    with pytest.raises(FormatError, match="AutoModelForCausalLM"):
        OPTModel.from_pretrained(small[0])


def test_damaged_files_raise_from_from_pretrained(small):
    path = small[0] / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(MixbitsError, match=r"model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(small[0])


def test_load_of_what_is_not_a_packed_model(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        mixbits.load(tmp_path / "nothing")
    build("opt-pre").save_pretrained(tmp_path / "plain")
    with pytest.raises(FormatError, match="no quantization_config"):
        mixbits.load(tmp_path / "plain")
    with pytest.raises(DataError, match=r"config\.json"):
        mixbits.load(tmp_path)


def test_missing_weight_file(small):
    (small[0] / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"model\.safetensors: no such file"):
        mixbits.load(small[0])
