"""The Triton kernels in Triton's interpreter, and compiled for GPUs that need not be there. Skipped aloud without Triton."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

CASES = [Path(__file__).with_name(name) for name in ("triton_cases.py", "triton_operator_cases.py")]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install 'mixbits[gpu]'): kernels not tested",
)
NUM_CASES = 105  # at least; a file that collects fewer tests less than it says


def test_all_cases_in_the_interpreter():
    """In a process of its own: Triton decides at its first import whether kernels are interpreted."""
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7):
        pytest.skip(f"Triton {version('triton')}: its interpreter fails with NumPy 2.4; kernels not run, only compiled")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        "ignore",
        *map(str, CASES),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("MIXBITS_TEST_DEVICE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=CASES[0].parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= NUM_CASES
    assert re.search(r"(\d+) skipped", done.stdout).group(1) == "2"  # what needs a GPU


def _compile(kernel, constants, types, capability):
    import triton

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = (
            "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        )
        if name.endswith("_ptr"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_stages": 2})


GRID = {"BITS": 2, "MULTIPLY": 2, "OFFSET": -3, "GROUP": 64, "HOIST": 64}
THREE = {"BITS": 3, "MULTIPLY": 1, "OFFSET": -3, "GROUP": 0, "HOIST": 256}
EIGHT = {"BITS": 8, "MULTIPLY": 1, "OFFSET": -127, "GROUP": 96, "HOIST": 32}
TILE = {"HAS_BIAS": True, "BM": 64, "BN": 64}


def _without_hoist(grid):
    return {name: value for name, value in grid.items() if name != "HOIST"}


def _jobs():
    from mixbits.kernels.triton import linear_kernels as linear
    from mixbits.kernels.triton import table_kernels as table

    half = {"words_ptr": "*i32", "groups_ptr": "*fp16", "x_ptr": "*bf16", "out_ptr": "*bf16", "bias_ptr": "*bf16"}
    bytes_ = {**half, "groups_ptr": "*u8", "x_ptr": "*i8"}
    index = {"ids_ptr": "*i64", "targets_ptr": "*i64", "sources_ptr": "*i32"}
    single = {"words_ptr": "*i32"}
    float_tile = {**TILE, "IS_SPLIT": False, "INT8": False, "UPCAST": False}
    return [
        ("gemv", linear.gemv_kernel, {**GRID, **TILE, "IS_SPLIT": False, "BM": 1}, half),
        ("gemv 3 bits, splits", linear.gemv_kernel, {**THREE, **TILE, "IS_SPLIT": True, "BM": 2}, {**half, "out_ptr": "*fp32"}),
        ("dot", linear.dot_kernel, {**GRID, **float_tile}, half),
        ("dot 8 bits float32", linear.dot_kernel, {**EIGHT, **float_tile, "BM": 32}, single),
        ("dot int8", linear.dot_kernel, {**EIGHT, **float_tile, "INT8": True}, bytes_),
        ("dot int8, row scales", linear.dot_kernel, {**THREE, **float_tile, "INT8": True}, bytes_),
        ("finish", linear.finish_kernel, {"INT8": True, "HAS_BIAS": True, "BN": 256}, {"out_ptr": "*bf16"}),
        ("quantize", linear.quantize_kernel, {"BK": 1024}, {"x_ptr": "*fp16", "out_ptr": "*i8"}),
        ("rows", table.rows_kernel, {**_without_hoist(THREE), "HAS_IDS": True, "BR": 1}, {**half, **index}),
        ("matrix", table.rows_kernel, {**_without_hoist(EIGHT), "HAS_IDS": False, "BR": 16}, {**half, "ids_ptr": "*i32"}),
        ("log-sum-exp", table.log_sum_exp_kernel, {**GRID, **TILE, "INT8": False, "UPCAST": False}, {**half, "out_ptr": "*fp32"}),
        ("targets", table.targets_kernel, {**_without_hoist(GRID), "HAS_BIAS": True, "INT8": False}, {**half, **index, "out_ptr": "*fp32"}),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_a_gpu(capability):
    """What the interpreter takes the compiler may not. Default tiles fit the shared memory of small GPUs, and products use tensor cores."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    product = "wgmma" if capability == 90 else "mma.sync"
    for name, kernel, constants, types in _jobs():
        compiled = _compile(kernel, constants, types, capability)
        assert len(compiled.asm["cubin"]) > 0, name
        assert compiled.metadata.shared <= 99 << 10, name
        if "float32" not in name and name.startswith(("dot", "log-sum-exp")):
            assert product in compiled.asm["ptx"], name
