"""Python's own documentation as (name, text) pairs, read from the running interpreter.

Three sources, each in a fixed order so that one interpreter always gives the same documents:
the topics behind `help()` (`pydoc_data.topics`), the docstrings of the standard library's `.py` files, and the
docstrings of the modules written in C. The `.py` files are parsed with `ast`, never imported: no side effects
(`import antigravity` opens a browser), and no missing graphics libraries. The C modules are imported, but only
those named in `C_MODULES`, whose import does nothing.

Limits: the documents differ between Python versions, so corpora are comparable only within one version
(`demo.prepare` records it). An interpreter without `pydoc_data` is refused with a clear error.
"""

import ast
import importlib
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from mixbits.errors import DataError

SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)
"""Folders of tests, demonstrations, generated code pages, bundled wheels or other people's packages."""

C_MODULES = (
    "_asyncio", "_collections", "_csv", "_functools", "_io", "_operator", "_random", "_struct", "_thread", "_weakref",
    "array", "binascii", "builtins", "cmath", "errno", "gc", "itertools", "marshal", "math", "mmap", "posix",
    "pyexpat", "resource", "select", "sys", "time", "unicodedata", "zlib",
)  # fmt: skip
"""Modules written in C whose docstrings are worth reading; those absent from an interpreter are passed over."""


def topic_documents() -> Iterator[tuple[str, str]]:
    """Yield the language-reference topics that `help()` shows, sorted by name.

    Raises DataError when this interpreter was built without `pydoc_data`.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "the demo's text is Python's own documentation, but this interpreter has no pydoc_data.topics; "
            "use a complete Python (python.org, uv, pyenv, or the distribution's full python3 package)"
        ) from error
    for name in sorted(topics):
        yield f"topic:{name}", topics[name]


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, in the order of the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text


def source_documents(stdlib: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield every docstring of the standard library's `.py` files, sorted by path; nothing is imported.

    `stdlib` is the folder to read (default: the running interpreter's). Files that do not parse are passed over.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib is None else stdlib
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    for path in sorted(paths, key=lambda item: item.parts):
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in path.parts[:-1]):
            continue
        if path.name.startswith("_sysconfigdata"):
            continue
        try:
            tree = ast.parse((root / path).read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for number, text in enumerate(_docstrings(tree)):
            yield f"source:{path.as_posix()}:{number}", text


def builtin_documents() -> Iterator[tuple[str, str]]:
    """Yield the docstrings of the C modules in `C_MODULES`, of their classes and of the classes' methods."""
    for module_name in C_MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        owners = [module, *(value for _, value in sorted(vars(module).items()) if isinstance(value, type))]
        for owner in owners:
            if isinstance(owner.__doc__, str):
                yield f"builtin:{module_name}:{getattr(owner, '__name__', '')}", owner.__doc__
            for name, value in sorted(vars(owner).items()):
                if inspect.isbuiltin(value) or inspect.ismethoddescriptor(value):  # not what Python code put there
                    text = getattr(value, "__doc__", None)
                    if isinstance(text, str):
                        yield f"builtin:{module_name}:{getattr(owner, '__name__', '')}.{name}", text


def documents() -> Iterator[tuple[str, str]]:
    """Yield all documents: topics, then source docstrings, then C docstrings."""
    yield from topic_documents()
    yield from source_documents()
    yield from builtin_documents()
