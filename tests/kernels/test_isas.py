"""Every instruction set of this processor, and NEON in an emulator: every number of a C++ program is the scalar code's.

NEON needs ``g++-aarch64-linux-gnu`` and ``qemu-user``; on a 64-bit ARM machine the first test does the same natively.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixbits.kernels import cpu

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("compare_isas.cpp")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
HEADERS = ROOT / "src" / "mixbits" / "kernels" / "csrc"
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}")
MISSING = [tool for tool in ("cmake", COMPILER, EMULATOR) if not shutil.which(tool)]


def run(*command, seconds=1800):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def check(text, isas):
    lines = text.splitlines()
    assert lines[0] == ",".join(isas)
    assert lines[-1].endswith(" comparisons")
    assert int(lines[-1].split()[0]) > 3000 * max(1, len(isas) - 1)


@pytest.mark.skipif(not cpu.is_available(), reason="no compiled library (no C++ compiler here)")
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="no g++: the C interface is not tested from C++"
)
def test_instruction_sets_of_this_processor(tmp_path):
    """Also that a step of few streams allocates nothing."""
    library, program = Path(cpu.why_unavailable()), tmp_path / "compare"
    run("g++", *FLAGS, PROGRAM, "-o", program, library, f"-Wl,-rpath,{library.parent}")
    for threads in (1, 2):
        check(run(program, threads), cpu.isas())


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"NEON is not tested here: no {', '.join(MISSING)}")
def test_neon_agrees_with_scalar(tmp_path):
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    processor = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    run("cmake", "-S", ROOT, "-B", tmp_path, *generator, *processor)
    run("cmake", "--build", tmp_path, "--parallel", "2")
    library, program = tmp_path / "libmixbits_cpu.so", tmp_path / "compare"
    run(COMPILER, *FLAGS, PROGRAM, "-o", program, library, f"-Wl,-rpath,{tmp_path}")
    check(run(EMULATOR, "-L", "/usr/aarch64-linux-gnu", program, 2), ["neon-dot", "scalar"])
