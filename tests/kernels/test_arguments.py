"""What the C functions refuse: error numbers, nothing read or written outside the buffers; finding and choosing the library."""

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mixbits.errors import SpecError
from mixbits.kernels import cpu
from mixbits.kernels.cpu import MatrixStruct
from mixbits.spec import QuantSpec

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="no compiled library (no C++ compiler here)")
SHAPE, BITS, SIZE, TOKEN, POINTER, ISA = 1, 2, 3, 4, 8, 9  # numbers of mixbits.h
HUGE = (2**31 + 1, 2**40, 2**62, 2**63 - 1, -1, -(2**63), 0)


def address(array):
    return array.ctypes.data


def changed(struct, **fields):
    """A copy with other numbers."""
    new = MatrixStruct.from_buffer_copy(struct)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


BAD_MATRICES = [
    ({"packed": None}, POINTER),
    ({"scales": None}, POINTER),
    ({"bits": 5}, BITS),
    ({"bits": 0}, BITS),
    ({"bits": -1}, BITS),
    ({"mul": 0}, BITS),
    ({"mul": 3}, BITS),
    ({"off": -1}, BITS),
    ({"off": 256}, BITS),
    ({"bits": 8, "mul": 2}, BITS),
    ({"bits": 8, "off": 3}, BITS),
    ({"group": -1}, SHAPE),
    ({"group": 65537}, SHAPE),
    ({"cols": 65537}, SHAPE),
    *(({field: value}, SHAPE) for field in ("rows", "cols") for value in HUGE),
]


@pytest.fixture
def matrix(twin):
    return twin("4-half-step", 70, 33).matrix


@pytest.mark.parametrize(("fields", "error"), BAD_MATRICES, ids=str)
def test_bad_matrices(matrix, fields, error):
    library, bad = cpu.library(), changed(matrix.struct, **fields)
    x, ids = np.ones((3, 33), np.float32), np.zeros(3, np.int64)
    y = np.full(3 * 70, 7, np.float32)
    offsets = np.array([0, 1, 2, 3])
    for mode in (0, 1):
        assert library.mb_linear(bad, mode, address(x), 3, None, address(y)) == error
        assert library.mb_log_softmax_at(bad, mode, address(x), 3, None, address(offsets), address(ids), address(y), None) == error  # fmt: skip
    assert library.mb_embedding(bad, address(ids), 3, address(y)) == error
    assert (y == 7).all()


def test_bad_arguments_of_products(matrix):
    library, good = cpu.library(), matrix.struct
    x, y = np.ones((3, 33), np.float32), np.full(3 * 70, 7, np.float32)
    cases = [
        ((None, 0, address(x), 3, None, address(y)), POINTER),
        ((good, 0, None, 3, None, address(y)), POINTER),
        ((good, 0, address(x), 3, None, None), POINTER),
        ((good, 0, address(x), -1, None, address(y)), SHAPE),
        ((good, 2, address(x), 3, None, address(y)), SHAPE),
        ((good, -1, address(x), 3, None, address(y)), SHAPE),
        ((good, 0, None, 0, None, None), 0),  # nothing to do
    ]
    for arguments, error in cases:
        assert library.mb_linear(*arguments) == error
    assert (y == 7).all()


def test_bad_rows_of_an_embedding(matrix):
    library, good = cpu.library(), matrix.struct
    y = np.full(4 * 33, 7, np.float32)
    for bad in (-1, 70, 2**31, 2**32, 2**62, -(2**63)):
        ids = np.array([0, 69, 5, bad])
        assert library.mb_embedding(good, address(ids), 4, address(y)) == TOKEN
    ids = np.zeros(4, np.int64)
    assert library.mb_embedding(good, None, 4, address(y)) == POINTER
    assert library.mb_embedding(good, address(ids), 4, None) == POINTER
    assert library.mb_embedding(None, address(ids), 4, address(y)) == POINTER
    assert library.mb_embedding(good, address(ids), 0, address(y)) == 0
    assert library.mb_embedding(good, address(ids), -4, address(y)) == SHAPE
    assert (y == 7).all()


@pytest.mark.parametrize(
    ("offsets", "targets", "error"),
    [
        ([1, 1, 2, 2], [0, 1], SIZE),
        ([-1, 1, 2, 2], [0, 1], SIZE),
        ([0, 2, 1, 2], [0, 1], SIZE),
        ([0, 2**40, 1, 2], [0, 1], SIZE),  # must be found before targets are read
        ([0, 2**62, -(2**62), 2], [0, 1], SIZE),
        ([0, 2, 2, 2], [1, 0], TOKEN),  # not ascending
        ([0, 2, 2, 2], [0, 70], TOKEN),
        ([0, 2, 2, 2], [-1, 0], TOKEN),
        ([0, 1, 2, 2], [2**40, 0], TOKEN),
    ],
)
def test_bad_targets(matrix, offsets, targets, error):
    x, out, partition = np.ones((3, 33), np.float32), np.full(2, 7, np.float32), np.full(3, 7, np.float32)
    offsets, targets = np.array(offsets), np.array(targets)
    found = cpu.library().mb_log_softmax_at(
        matrix.struct, 0, address(x), 3, None, address(offsets), address(targets), address(out), address(partition)
    )
    assert found == error
    assert (out == 7).all()
    assert (partition == 7).all()


def test_missing_pointers_of_log_softmax(matrix):
    library, good = cpu.library(), matrix.struct
    x, out = np.ones((3, 33), np.float32), np.full(2, 7, np.float32)
    offsets, targets = np.array([0, 1, 2, 2]), np.array([0, 1])
    whole = (good, 0, address(x), 3, None, address(offsets), address(targets), address(out), None)
    assert library.mb_log_softmax_at(*whole) == 0
    assert (out < 0).all()
    for place, error in ((0, POINTER), (2, POINTER), (5, POINTER), (6, TOKEN), (7, TOKEN)):
        out[:] = 7
        assert library.mb_log_softmax_at(*whole[:place], None, *whole[place + 1 :]) == error
        assert (out == 7).all()
    for number, error in ((-1, SHAPE), (0, 0)):
        assert library.mb_log_softmax_at(*whole[:3], number, *whole[4:]) == error
    assert library.mb_log_softmax_at(good, 7, *whole[2:]) == SHAPE


def test_sizes():
    library = cpu.library()
    for rows, cols, group, bits in itertools.product(HUGE, (1, 65536), (0, 1), (1, 3, 8, 16)):
        assert library.mb_packed_bytes(rows, cols, group, bits) == -1
        assert library.mb_num_scales(rows, cols, group) == -1
    for cols in (*HUGE, 65537):
        assert library.mb_packed_bytes(1, cols, 0, 4) == -1
    for group in (-1, 65537, 2**40, -(2**63)):
        assert library.mb_packed_bytes(1, 1, group, 4) == -1
    for bits in (-1, 0, 5, 6, 7, 9, 15, 17, 32):
        assert library.mb_packed_bytes(1, 1, 0, bits) == -1
    assert library.mb_packed_bytes(2**31, 65536, 1, 1) == 2**25 * 65536 * 256  # the largest one does not overflow
    assert library.mb_num_scales(2**31, 65536, 1) == 2**47
    assert library.mb_packed_bytes(1, 1, 0, 1) == 256


@pytest.mark.parametrize("spec", ["1", "1.58", "2-g7", "3-half-step", "4-g32", "8", "16"])
def test_repacking_takes_exact_sizes_and_writes_inside(twin, spec):
    library, rows, cols = cpu.library(), 67, 29
    t = twin(spec, rows, cols)
    layout = t.matrix.layout
    size = library.mb_packed_bytes(rows, cols, layout.group, layout.bits)
    wanted = QuantSpec.parse(spec).code_bytes(rows * cols)
    codes = np.random.default_rng(0).integers(0, 255, wanted + 1, dtype=np.uint8)
    out = np.full(size + 128, 77, np.uint8)
    inner = address(out) + 64
    whole = (rows, cols, layout.group, layout.bits, int(layout.ternary))
    for wrong in (wanted - 1, wanted + 1, 0, -1, 2**62):
        assert library.mb_repack(address(codes), wrong, *whole, inner) == SIZE
    assert library.mb_repack(None, wanted, *whole, inner) == POINTER
    assert library.mb_repack(address(codes), wanted, *whole, None) == POINTER
    assert library.mb_repack(address(codes), wanted, rows, cols, layout.group, 3, 1, inner) == SHAPE  # ternary: 2 bits
    assert library.mb_repack(address(codes), wanted, 0, cols, layout.group, layout.bits, 0, inner) == SHAPE
    assert (out == 77).all()
    assert library.mb_repack(address(codes), wanted, *whole, inner) == 0
    assert (out[:64] == 77).all()
    assert (out[-64:] == 77).all()


def test_8_bit_codes_have_255_levels():
    """A code of 255 would wrap to the weight -128, which the instruction sets multiply differently."""
    codes, out = np.full(6, 254, np.uint8), np.full(4096, 77, np.uint8)
    assert cpu.library().mb_repack(address(codes), 6, 2, 3, 0, 8, 0, address(out)) == 0
    codes[5], out[:] = 255, 77
    assert cpu.library().mb_repack(address(codes), 6, 2, 3, 0, 8, 0, address(out)) == BITS
    assert (out == 77).all()


def test_repacking_scales():
    library, rows, cols, group = cpu.library(), 67, 29, 7
    scales = np.arange(rows * 5, dtype=np.float32)
    size = library.mb_num_scales(rows, cols, group)
    assert size == 128 * 5
    out = np.full(size + 32, 7.5, np.float32)
    inner = address(out) + 64
    for wrong in (1, 4, 6, -1, 2**62):
        assert library.mb_repack_scales(address(scales), wrong, 1.0, rows, cols, group, inner) == SIZE
    assert library.mb_repack_scales(None, 5, 1.0, rows, cols, group, inner) == POINTER
    assert library.mb_repack_scales(address(scales), 5, 1.0, rows, cols, group, None) == POINTER
    assert library.mb_repack_scales(address(scales), 5, 1.0, -1, cols, group, inner) == SHAPE
    assert (out == 7.5).all()
    assert library.mb_repack_scales(address(scales), 5, 0.5, rows, cols, group, inner) == 0
    assert (out[:16] == 7.5).all()
    assert (out[-16:] == 7.5).all()
    by_block = out[16:-16].reshape(2, 5, 64)
    assert (by_block.transpose(0, 2, 1).reshape(128, 5)[:rows] == scales.reshape(rows, 5) / 2).all()
    assert (by_block.transpose(0, 2, 1).reshape(128, 5)[rows:] == 0).all()


def test_python_refuses_tensors_that_do_not_fit():
    spec, codes = QuantSpec.parse("4-g8"), torch.zeros(40, dtype=torch.uint8)
    for scale in (None, torch.ones(4, 2), torch.ones(5, 1), torch.ones(1, 2), torch.ones(5, 3), torch.ones(10)):
        with pytest.raises(SpecError, match="scales have shape"):
            cpu.repack(codes, scale, spec, 5, 16)
    assert cpu.repack(codes, torch.ones(5, 2), spec, 5, 16).rows == 5
    with pytest.raises(SpecError, match=r"4-papers-g8.*does not have the size"):
        cpu.repack(codes[:-1], torch.ones(5, 2), spec, 5, 16)
    with pytest.raises(SpecError, match=r"codes are torch\.float16.*uint8"):
        cpu.repack(codes.half(), torch.ones(5, 2), spec, 5, 16)
    with pytest.raises(SpecError, match=r"codes are torch\.bfloat16.*float16"):
        cpu.repack(torch.ones(5, 16, dtype=torch.bfloat16), None, QuantSpec(16), 5, 16)
    with pytest.raises(SpecError, match="at most 65536 columns"):
        cpu.repack(codes, torch.ones(1, 1), QuantSpec(4), 1, 65537)
    with pytest.raises(SpecError, match="product units"):
        cpu.repack(codes, None, QuantSpec.parse("1-product"), 5, 16)
    with pytest.raises(SpecError, match=r"activations is 'int4'; expected int8 or float32"):
        cpu.activation_number("int4")


def test_instruction_sets_and_threads_by_name():
    with pytest.raises(SpecError, match=r"no instruction set 'mmx' here; .*scalar"):
        cpu.set_isa("mmx")
    assert cpu.library().mb_set_isa(b"") == ISA
    for name in cpu.isas():
        cpu.set_isa(name)
        assert cpu.isa() == name
    for bad in (0, -1, 1025, 2**40):
        with pytest.raises(SpecError, match="1 to 1024"):
            cpu.set_num_threads(bad)
    texts = [cpu.library().mb_error_text(number).decode() for number in range(11)]
    assert len(set(texts)) == 11
    assert texts[0] == "no error"
    assert texts[10] == cpu.library().mb_error_text(-(2**31)).decode() == "unknown error"
    with pytest.raises(MemoryError, match="here: out of memory"):
        cpu.check(7, "here")
    with pytest.raises(SpecError, match="here: impossible shape"):
        cpu.check(1, "here")


SCRIPT = """
import os, sys, warnings
from mixbits.errors import KernelUnavailable, SpecError
from mixbits.kernels import cpu, ops

def with_environment(**names):
    for name in ("MIXBITS_LIBRARY", "MIXBITS_ISA", "MIXBITS_THREADS", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(names)
    cpu._load.cache_clear()

def error_of(kind, function, *arguments):
    try:
        function(*arguments)
    except kind as error:
        return str(error)
    raise SystemExit(f"{function} did not raise {kind}")

missing = sys.argv[1]
assert cpu.is_available() is False
assert cpu.why_unavailable() == f"no {missing}"
text = error_of(KernelUnavailable, cpu.library)
assert missing in text and "install with a C++ compiler" in text, text
assert missing in error_of(KernelUnavailable, cpu.isas)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    cpu.say_unavailable()
    cpu.say_unavailable()
assert len(said) == 1 and missing in str(said[0].message) and "slower" in str(said[0].message)

broken = sys.argv[2]
with_environment(MIXBITS_LIBRARY=broken)
assert "cannot be loaded" in error_of(KernelUnavailable, cpu.library)
with_environment(MIXBITS_LIBRARY=sys.argv[3])  # a library, but another one
assert "cannot be loaded" in error_of(KernelUnavailable, cpu.library)

with_environment(MIXBITS_ISA="sse9")
text = error_of(SpecError, cpu.is_available)
assert text.startswith("MIXBITS_ISA is 'sse9'; this machine and build have") and text.endswith("scalar"), text
with_environment(MIXBITS_ISA="scalar")
assert cpu.isa() == "scalar"
for bad in ("0", "-1", "many", "1.5", "1025", "99999999999999999999", "4294967297"):
    with_environment(MIXBITS_THREADS=bad)
    text = error_of(SpecError, cpu.is_available)
    assert text.startswith(f"MIXBITS_THREADS is '{bad}'; expected a whole number of threads"), text
with_environment(MIXBITS_THREADS="3", OMP_NUM_THREADS="2")
assert cpu.num_threads() == 3
with_environment(OMP_NUM_THREADS="2")
assert cpu.num_threads() == 2
for other in ("", "4,2", "0", "99999999999999999999"):
    with_environment(OMP_NUM_THREADS=other)
    assert cpu.num_threads() == min(len(os.sched_getaffinity(0)), 1024)
with_environment()
assert cpu.is_available() and cpu.isa() == cpu.isas()[0]
print("all")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names of shared libraries and processor affinity are Linux's here")
def test_finding_the_library(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF not a library")
    other = next(p for p in _mapped_libraries() if Path(p).name.startswith("libc.so"))
    missing = str(tmp_path / "nowhere.so")
    environment = {**os.environ, "MIXBITS_LIBRARY": missing}
    done = subprocess.run([sys.executable, "-c", SCRIPT, missing, str(broken), other], capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "all\n"


def _mapped_libraries():
    with open("/proc/self/maps") as maps:
        return [line.split()[-1] for line in maps if ".so" in line]


def test_the_structures_are_those_of_the_header():
    """Sizes by C's rules for the fields of mixbits.h."""
    assert ctypes.sizeof(cpu.MatrixStruct) == 56
    assert ctypes.sizeof(cpu.LayerStruct) == 7 * 56 + 7 * 8 + 4 * 8
    assert ctypes.sizeof(cpu.ModelStruct) == 12 * 4 + 8 + 3 * 56 + 5 * 8 + 8
