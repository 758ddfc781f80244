"""The C++ sources under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer: no reports."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "mixbits" / "kernels" / "csrc"
PROGRAM = Path(__file__).with_name("compare_isas.cpp")
LIBRARY = "libmixbits_cpu.so"
# Tests that go over products, repacking, arguments and streams on awkward shapes, run again on the instrumented library.
AGAIN = ("tests/kernels/test_arguments.py", "tests/kernels/test_cpu.py", "tests/engine/test_streams.py")
WHICH = "arguments and not finding or random or widest or spoil or order or refused or c_functions"
REPORTS = ("AddressSanitizer", "runtime error:", "ThreadSanitizer")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded the Linux way"),
    pytest.mark.skipif(
        not (shutil.which("cmake") and shutil.which("g++")), reason="no cmake or g++: the C++ code is not tested"
    ),
]


def run(command, seconds=1200, **environment):
    """Standard output and error together; fails for another exit code than 0 and for a sanitizer's report."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, timeout=seconds,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert not any(report in text for report in REPORTS), text[-4000:]
    return text


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory):
    """The library built by cmake with MIXBITS_SANITIZE=ON."""
    folder = tmp_path_factory.mktemp("sanitized")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(["cmake", "-S", ROOT, "-B", folder, *generator, "-DMIXBITS_SANITIZE=ON"])
    run(["cmake", "--build", folder, "--parallel", "2"])
    assert (folder / LIBRARY).is_file()
    return folder


def test_a_program_of_products_and_models(instrumented):
    """Everything the C interface has, in buffers of exact sizes."""
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    run(
        ["g++", *flags, f"-I{SOURCES}", PROGRAM, "-o", instrumented / "compare", instrumented / LIBRARY, f"-Wl,-rpath,{instrumented}"]
    )  # fmt: skip
    assert "comparisons" in run([instrumented / "compare", 3])


def test_the_python_tests_again(instrumented):
    """Refused arguments included: nothing is read or written outside NumPy's and PyTorch's buffers."""
    preloaded = run(["g++", "-print-file-name=libasan.so"]).strip()
    text = run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", WHICH, *AGAIN],
        LD_PRELOAD=preloaded, ASAN_OPTIONS="detect_leaks=0", MIXBITS_LIBRARY=str(instrumented / LIBRARY),
    )  # fmt: skip
    assert int(text.rpartition(" passed")[0].split()[-1]) > 80
    assert "skipped" not in text


def test_instruction_sets_do_not_leak(instrumented):
    """No function that the linker might share between sources stands in a source for one instruction set: it could be taken for all
    processors. (Here at -O1, where less is inlined than in a release.)
    """
    if not shutil.which("nm"):
        pytest.skip("no nm: shared functions not looked for")
    objects = sorted(instrumented.rglob("isa_*.cpp.o"))
    assert len(objects) == 5
    for path in objects:
        shared = [line for line in run(["nm", path]).splitlines() if line[17:18] in "VWu" and "DW.ref." not in line]
        assert shared == [], path.name


def test_threads_do_not_race(tmp_path):
    if platform.machine() != "x86_64" or " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("ThreadSanitizer is run with AVX2 only")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-mavx2", "-ffp-contract=off", "-w"]
    run(["g++", *flags, f"-I{SOURCES}", *sorted(SOURCES.glob("*.cpp")), PROGRAM, "-o", tmp_path / "compare", "-lpthread"])  # fmt: skip
    assert "comparisons" in run([tmp_path / "compare", 3])


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_jobs_of_the_pool(tmp_path, sanitizer):
    """Also on a single core, where helpers have to give way."""
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    run(["g++", *flags, SOURCES / "pool.cpp", PROGRAM.with_name("pool_jobs.cpp"), "-o", tmp_path / "jobs", "-lpthread"])
    assert run([tmp_path / "jobs", 6000]) == "6000 jobs\n"
    core = str(min(os.sched_getaffinity(0)))
    if shutil.which("taskset"):
        assert run(["taskset", "-c", core, tmp_path / "jobs", 2000]) == "2000 jobs\n"
