"""Check that the built wheel and sdist are complete, and that the wheel works when installed by itself."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

IN_WHEEL = ("mixbits/py.typed", "mixbits/report/templates/report.html.j2", "mixbits/cli/main.py", "mixbits/spec.py")
IN_SDIST = (
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
    "src/mixbits/spec.py",
    "CMakeLists.txt",
    "src/mixbits/kernels/csrc/mixbits.h",
)
LIBRARIES = ("libmixbits_cpu.so", "libmixbits_cpu.dylib", "mixbits_cpu.dll")
USE_IT = """
import mixbits, sys
from pathlib import Path
assert Path(mixbits.__file__).is_relative_to(sys.argv[1]), f"imported from {mixbits.__file__}, not from the wheel"
from mixbits.kernels import cpu
assert cpu.is_available() == (sys.argv[2] == "compiled"), cpu.why_unavailable()
assert not cpu.is_available() or Path(cpu.why_unavailable()).is_relative_to(sys.argv[1]), cpu.why_unavailable()
from mixbits.cli.main import main
from mixbits.report.page import page
from mixbits.summary import Summary, SummaryRow
assert main(["--help"]) == 0
assert "learned-16x" in page([Summary("t", (SummaryRow("learned-16x", ppl=2.0, bytes=10),))])
"""


def missing(names: list[str], wanted: tuple[str, ...]) -> list[str]:
    return [name for name in wanted if name not in names]


def main(folder: Path) -> int:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    lacking = missing(names, IN_WHEEL)
    compiled = any(Path(name).name in LIBRARIES for name in names)
    if not compiled and (shutil.which("c++") or shutil.which("g++")):
        lacking.append("the compiled kernels")
    strays = [n for n in names if n.split("/")[0] not in ("mixbits", f"{wheel.name.split('-py3')[0]}.dist-info")]
    with tarfile.open(sdist) as archive:
        inside = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    lacking += missing(inside, IN_SDIST)
    if lacking or strays:
        print(f"incomplete: missing {lacking}, not ours {strays}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as target:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", target, str(wheel)], check=True)
        # An editable installation's finder would come first, before any path.
        only_paths = "sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]"
        code = f"import sys; {only_paths}; sys.path.insert(0, sys.argv[1]){USE_IT}"
        subprocess.run(
            [sys.executable, "-c", code, target, "compiled" if compiled else "none"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=target,
        )
    print(f"{wheel.name} and {sdist.name} are complete; the wheel works by itself")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
