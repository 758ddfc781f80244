"""Damaged, truncated and hostile weight files and configs: one clear FormatError each, never a crash."""

import json
import random
import struct

import pytest
import torch

from mixbits.errors import DataError, FormatError, MixbitsError
from mixbits.packing.verify import read_units, verify_packed
from mixbits.packing.weightfile import read_weight_file, write_weight_file
from mixbits.spec import StoredTensor

EMBED = "model.decoder.embed_tokens"
FILE = "model.safetensors"
GOOD_META = {"format": "mixbits", "format_version": "1"}


def write_header(path, entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def header(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def test_a_good_model_passes(packed, job):
    weight_file, units = verify_packed(packed)
    assert {u.name: units.specs[u.name] for u in units.units} == dict(job.allocation.specs)
    assert {u.name: (u.rows, u.cols, u.kind, u.tied) for u in units.units} == {
        u.name: (u.rows, u.cols, u.kind, u.tied) for u in job.inventory.units
    }
    assert weight_file.file_bytes == (packed / FILE).stat().st_size


def test_cut_anywhere(packed):
    whole = (packed / FILE).read_bytes()
    for cut in [*range(0, 40), *range(40, len(whole), 97), len(whole) - 1]:
        (packed / FILE).write_bytes(whole[:cut])
        with pytest.raises(FormatError, match=FILE):
            verify_packed(packed)
    (packed / FILE).write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="bytes after the last tensor"):
        verify_packed(packed)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 70 << 20])
def test_absurd_header_length(length, tmp_path):
    path = write_header(tmp_path / "x", {}, b"\0" * 100, length=length)
    with pytest.raises(FormatError, match=f"header length says {length}"):
        read_weight_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[1]", "JSON list"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"a":1,"a":2}', "stands there twice"),
        (b'{"a":{"shape":[' + b"9" * 5000 + b"]}}", "not readable as JSON"),
        (b"{}", "__metadata__.format is None"),
        (b'{"__metadata__":[]}', "__metadata__.format is None"),
        (b'{"__metadata__":{"format":"pt"}}', "__metadata__.format is 'pt'"),
        (b'{"__metadata__":{"format":"mixbits","format_version":"9"}}', "format_version is '9'"),
    ],
)
def test_damaged_header(text, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read_weight_file(write_header(tmp_path / "x.safetensors", text))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "expected exactly the fields"),
        ({"dtype": "U8", "shape": [4]}, "expected exactly the fields"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "dtype is 'F32'"),
        ({"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}, "dtype is"),
        ({"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}, "shape is 4"),
        ({"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}, "shape is"),
        ({"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}, "shape is"),
        ({"dtype": "U8", "shape": [True, 4], "data_offsets": [0, 4]}, "shape is"),
        ({"dtype": "U8", "shape": [1] * 9, "data_offsets": [0, 1]}, "shape is"),
        ({"dtype": "U8", "shape": [1 << 62], "data_offsets": [0, 4]}, "shape is"),
        ({"dtype": "U8", "shape": [1 << 50, 1 << 50], "data_offsets": [0, 4]}, "data_offsets span 4 bytes"),
        ({"dtype": "F16", "shape": [4], "data_offsets": [0, 4]}, "takes 8"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}, "data_offsets span -4"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0]}, "data_offsets are"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [0, None]}, "data_offsets are"),
        ({"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}, "begin at 1; expected 0"),
        ({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}, "cut short"),
        ({"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}, "bytes after the last tensor"),
    ],
)
def test_damaged_entry_names_tensor_and_field(entry, message, tmp_path):
    path = write_header(tmp_path / "x.safetensors", {"__metadata__": GOOD_META, "a.weight": entry}, b"\0" * 4)
    with pytest.raises(FormatError, match=message) as caught:
        read_weight_file(path)
    assert "x.safetensors" in str(caught.value)


def test_overlap_and_gap(tmp_path):
    for begin in (2, 6):
        entries = {
            "__metadata__": GOOD_META,
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [begin, begin + 4]},
        }
        with pytest.raises(FormatError, match=f"'b': data_offsets begin at {begin}; expected 4"):
            read_weight_file(write_header(tmp_path / "x", entries, b"\0" * (begin + 4)))


def _rewrite(packed, edit):
    """Change stored tensors consistently; ``edit(name, entry, tensor)`` gives a new (entry, tensor) or None to drop."""
    parsed = read_weight_file(packed / FILE)
    stored, tensors = [], {}
    reader = parsed.reader()
    for entry in parsed.tensors:
        result = edit(entry.name, entry, reader.tensor(entry))
        if result is not None:
            stored.append(result[0])
            tensors[result[0].name] = result[1]
    write_weight_file(packed / FILE, stored, tensors)


def _on(wanted, change):
    return lambda name, entry, tensor: change(entry, tensor) if name == wanted else (entry, tensor)


def _set(index, value):
    def change(entry, tensor):
        tensor[index] = value
        return entry, tensor

    return change


FC2, K, V, Q = (
    f"model.decoder.layers.0.{leaf}" for leaf in ("fc2", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")
)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_on(f"{EMBED}.scales", lambda e, t: None), rf"{EMBED}\.scales' is missing"),
        (_on(f"{EMBED}.weight", lambda e, t: None), rf"{EMBED}\.weight' is missing"),
        (_on(f"{EMBED}.scales", _set(2, float("nan"))), rf"{EMBED}\.scales': has NaN"),
        (_on(f"{FC2}.bias", _set(0, float("inf"))), r"fc2\.bias': has NaN or infinite"),
        (_on(f"{EMBED}.weight", _set(0, 250)), "a byte is 250; five ternary"),
        (_on(f"{K}.weight", _set(0, 7)), r"k_proj\.weight': code 7 is out of range"),
        (_on(f"{V}.weight", _set(1, 0xF0)), r"v_proj\.weight': code 15 is out of range"),
        (_on(f"{Q}.weight", _set(5, 255)), r"q_proj\.weight': code 255 is out of range"),
        (
            _on(f"{EMBED}.scales", lambda e, t: (StoredTensor(e.name, "F16", (1, 23)), t.view(1, 23))),
            r"scales': shape is \(1, 23\); expected \(23,\)",
        ),
        (
            _on(f"{EMBED}.weight", lambda e, t: (StoredTensor(e.name, "F16", (37,)), t[:74].view(torch.float16))),
            r"embed_tokens\.weight': dtype is F16; expected U8",
        ),
        (
            _on(f"{EMBED}.weight", lambda e, t: (StoredTensor(e.name, "U8", (70,)), t[:70])),
            r"embed_tokens\.weight': shape is \(70,\); expected \(74,\)",
        ),
        (
            _on(f"{FC2}.bias", lambda e, t: (StoredTensor(e.name, "U8", (32,)), t.view(torch.uint8))),
            r"fc2\.bias' is U8 but no unit",
        ),
    ],
)
def test_tensors_that_do_not_fit_their_unit(edit, message, packed):
    _rewrite(packed, edit)
    with pytest.raises(FormatError, match=message) as caught:
        verify_packed(packed)
    assert FILE in str(caught.value)


GOOD_UNIT = {"spec": "2-half-step-row", "rows": 4, "cols": 8, "kind": "linear", "tied": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "5"}, r"\.spec: bit width 5"),
        ({"spec": 2}, r"\.spec is 2"),
        ({"spec": None}, r"\.spec is None"),
        ({"spec": "inf"}, r"\.spec: bit width inf"),
        ({"spec": "nan"}, r"\.spec: bit width nan"),
        ({"rows": 0}, r"\.rows is 0"),
        ({"rows": -1}, r"\.rows is -1"),
        ({"rows": 1 << 70}, r"\.rows is 118"),
        ({"cols": True}, r"\.cols is True"),
        ({"cols": "8"}, r"\.cols is '8'"),
        ({"cols": 8.0}, r"\.cols is 8"),
        ({"kind": "conv2d"}, r"\.kind is 'conv2d'"),
        ({"tied": "lm_head"}, r"\.tied is 'lm_head'"),
        ({"tied": [3]}, r"\.tied is"),
        ({"tied": ["a"]}, "'a' is tied to 'a' and is also another unit"),
    ],
)
def test_bad_unit_description(change, message):
    config = {"quant_method": "mixbits", "format_version": 1, "units": {"a": {**GOOD_UNIT, **change}}}
    with pytest.raises(FormatError, match=message) as caught:
        read_units(config, where="c.json")
    assert "c.json" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "quant_method is None"),
        ([], "quant_method is None"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "mixbits"}, "format_version is None"),
        ({"quant_method": "mixbits", "format_version": "1"}, "format_version is '1'"),
        ({"quant_method": "mixbits", "format_version": 1}, "units is missing"),
        ({"quant_method": "mixbits", "format_version": 1, "units": [1]}, "units is missing"),
        ({"quant_method": "mixbits", "format_version": 1, "units": {"a": 2}}, "expected an object"),
    ],
)
def test_bad_quantization_config(config, message):
    with pytest.raises(FormatError, match=message):
        read_units(config, where="c.json")


def test_missing_files(tmp_path, packed):
    with pytest.raises(DataError, match=r"config\.json"):
        verify_packed(tmp_path / "nothing")
    (packed / FILE).unlink()
    with pytest.raises(DataError, match=FILE):
        verify_packed(packed)
    (packed / FILE).mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        verify_packed(packed)


# --- checksums


def _config(packed, change):
    path = packed / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_every_flipped_bit_of_the_tensors_is_found(packed):
    """CRC-32 finds every single flipped bit for certain; a few of each byte are tried."""
    whole = (packed / FILE).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    parsed = read_weight_file(packed / FILE)
    rng = random.Random(0)
    for at in range(8 + length, len(whole), 7):
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        (packed / FILE).write_bytes(data)
        name = max((o, n) for n, o in parsed.offsets.items() if o <= at)[1]
        with pytest.raises(FormatError, match=rf"tensor '{name}': .*damaged"):
            verify_packed(packed)


def test_bits_that_no_other_check_finds(packed):
    """A bias, a scale and a valid code changed: only the checksum tells, and it says what it found."""
    for name in (f"{FC2}.bias", f"{EMBED}.scales"):
        original = (packed / FILE).read_bytes()
        _rewrite(packed, _on(name, _set(1, 0.5)))
        with pytest.raises(
            FormatError, match=rf"{name}': its checksum is [0-9a-f]{{8}}, quantization_config\.checksums says"
        ):
            verify_packed(packed)
        _config(packed, lambda q: q.update(format_version=1))
        verify_packed(packed)  # version 1 had none
        _config(packed, lambda q: q.update(format_version=2))
        (packed / FILE).write_bytes(original)
    verify_packed(packed)


def test_weights_of_another_model_of_the_same_shape(job, packed, tmp_path):
    job.weights[FC2].codes.fill_(0)
    job.save(tmp_path / "other")
    (packed / FILE).write_bytes((tmp_path / "other" / FILE).read_bytes())
    with pytest.raises(FormatError, match=r"fc2\.weight': its checksum is"):
        verify_packed(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("checksums"), "checksums is missing"),
        (lambda q: q.update(checksums=[]), "checksums is missing"),
        (
            lambda q: q["checksums"].update({f"{EMBED}.weight": "0" * 7}),
            "embed_tokens.weight'. is '0000000'; expected a CRC-32",
        ),
        (lambda q: q["checksums"].update({f"{EMBED}.weight": 5}), "is 5; expected"),
        (lambda q: q["checksums"].update({f"{EMBED}.weight": "0000000G"}), "is '0000000G'; expected"),
        (lambda q: q["checksums"].update({f"{EMBED}.weight": "00000000"}), "says 00000000: damaged"),
        (lambda q: q["checksums"].pop(f"{FC2}.bias"), r"fc2\.bias' has no checksum"),
        (
            lambda q: q["checksums"].update(ghost="00000000"),
            "'ghost' is missing; quantization_config.checksums promises",
        ),
        (lambda q: q.pop("byte_order"), "byte_order is None"),
        (lambda q: q.update(byte_order="big"), "byte_order is 'big'"),
        (lambda q: q.update(archive="lzma"), "archive is 'lzma'; this mixbits reads 'gzip'"),
        (lambda q: q.update(archive=None), "archive is None"),
        (lambda q: q.update(format_version=3), "format_version is 3; this mixbits reads 1 to 2"),
        (lambda q: q.update(format_version=True), "format_version is True"),
        (lambda q: q.update(format_version=2.0), "format_version is 2.0"),
        (lambda q: q["units"][EMBED].update(tied=["model.decoder.final_layer_norm"]), "is stored, but .* ties it to"),
    ],
)
def test_damaged_checksums_and_fields(change, message, packed):
    _config(packed, change)
    with pytest.raises(FormatError, match=message):
        verify_packed(packed)


def test_large_files_are_checked_in_parallel(tmp_path, monkeypatch):
    """Above a size several threads check; the error is still that of the first damaged tensor in file order."""
    monkeypatch.setattr("mixbits.packing.verify._SMALL_BYTES", 0)
    monkeypatch.setattr("mixbits.packing.verify.os.cpu_count", lambda: 3)
    stored = [StoredTensor(f"u{i}.weight", "U8", (5000,)) for i in range(20)]
    scales = [StoredTensor(f"u{i}.scales", "F16", (1,)) for i in range(20)]
    tensors = {t.name: torch.full(t.shape, i % 3, dtype=torch.uint8) for i, t in enumerate(stored)}
    tensors |= {t.name: torch.ones(1, dtype=torch.float16) for t in scales}
    write_weight_file(tmp_path / FILE, [*scales, *stored], tensors)
    unit = {"spec": "8-papers-tensor", "rows": 50, "cols": 100, "kind": "linear"}
    config = {"quant_method": "mixbits", "format_version": 1, "units": {f"u{i}": unit for i in range(20)}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    verify_packed(tmp_path)
    for name in ("u17.weight", "u9.weight"):
        tensors[name][77] = 255
        write_weight_file(tmp_path / FILE, [*scales, *stored], tensors)
        with pytest.raises(FormatError, match=rf"tensor '{name}': code 255"):
            verify_packed(tmp_path)


def test_mutated_files_raise_mixbits_errors_only(packed):
    """Random bytes changed, removed or inserted, mostly in the header: accepted or refused, never another exception."""
    whole = (packed / FILE).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    rng = random.Random(3)
    messages = []
    for _ in range(700):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(8 + length if rng.random() < 0.9 else len(data))
            kind = rng.random()
            if kind < 0.6:
                data[at] = rng.choice((rng.randrange(256), rng.choice(b'0123456789[]{},:"-eE')))
            elif kind < 0.8:
                del data[at : at + rng.randint(1, 5)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 5))
        (packed / FILE).write_bytes(data)
        try:
            verify_packed(packed)
        except MixbitsError as error:
            messages.append(str(error))
    assert len(messages) > 500
    assert all(FILE in message or "config.json" in message for message in messages)


def test_writer_leaves_the_old_file_when_it_fails(packed):
    before = (packed / FILE).read_bytes()
    parsed = read_weight_file(packed / FILE)
    with pytest.raises(KeyError):
        write_weight_file(packed / FILE, parsed.tensors, {})
    assert (packed / FILE).read_bytes() == before
    assert not [p for p in packed.iterdir() if p.name.endswith(".tmp")]
