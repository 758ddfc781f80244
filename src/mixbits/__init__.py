"""mixbits: Transformer language models in one to three bits a weight, and speech rescoring with them."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public functions, imported only when first used, so that `import mixbits` stays light: name -> module that defines it.
_LAZY = {
    "Engine": "mixbits.engine",
    "compress": "mixbits.pipeline.compress",
    "load": "mixbits.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mixbits' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
