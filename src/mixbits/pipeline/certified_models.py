"""The two models of a certificate: bytes on disk, hashes, and whether the packed one says it came from the full one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mixbits.lm.checkpoint import model_hash
from mixbits.packing.inspect import inspect_packed
from mixbits.quant.units import find_units
from mixbits.runs import read_json

_CARD_ROW = r"^\| {} \| ([0-9a-f]{{64}}) \|$"


def model_facts(full: Path, packed: Path, full_model: Any, text_sha256: str, warnings: list[str]) -> dict[str, Any]:
    """Facts for the certificate; what is doubtful is added to ``warnings``.

    ``file_bytes`` are those of the weight files as the file system counts them, of archived ones unpacked (``disk_bytes``: as they
    are); ``compression_ratio`` is 4 bytes × the distinct parameters of ``full`` over those of ``packed``, ``stored_ratio``
    compares the two. Raises FormatError for a packed model whose files are damaged.
    """
    inventory = find_units(full_model)
    full_facts: dict[str, Any] = {
        "sha256": model_hash(full),
        "file_bytes": weight_bytes(full),
        "num_parameters": inventory.num_parameters,
        "float32_bytes": inventory.full_bytes,
    }
    source = card_hash(packed, "source model sha256")
    facts: dict[str, Any] = {
        "packed": is_quantized(packed),
        "sha256": model_hash(packed),
        "file_bytes": weight_bytes(packed),
        "source_sha256": source,
        "from_full": None if source is None else source == full_facts["sha256"],
    }
    if facts["packed"]:
        info = inspect_packed(packed)
        facts |= {"file_bytes": info.file_bytes, "disk_bytes": info.disk_bytes}
        facts |= {"num_parameters": info.num_parameters, "bits_per_weight": info.bits_per_weight}
        if info.num_parameters != inventory.num_parameters:
            warnings.append(
                f"the packed model has {info.num_parameters:,} parameters, full precision {inventory.num_parameters:,}: not the same architecture"
            )
        warnings += _source_warnings(source, full_facts["sha256"])
    else:
        warnings.append(
            "the second model is not packed: it is compared as it is, and its ratio says nothing about compression"
        )
    if card_hash(packed, "training text sha256") == text_sha256:
        warnings.append(
            "the packed model was trained on this very text, so the perplexities are too good; certify on text it has not seen"
        )
    return {
        "full": full_facts,
        "packed": facts,
        "compression_ratio": inventory.full_bytes / facts["file_bytes"],
        "stored_ratio": full_facts["file_bytes"] / facts["file_bytes"],
    }


def _source_warnings(source: str | None, full_hash: str) -> list[str]:
    if source is None:
        return ["the packed model's README.md does not say which model it was made from"]
    if source != full_hash:
        return [
            f"the packed model was made from another model (sha256 {source[:12]}…) than this one ({full_hash[:12]}…)"
        ]
    return []


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files of a model that is not packed."""
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def is_quantized(directory: Path) -> bool:
    """Whether config.json names a quantization."""
    config = read_json(directory / "config.json")
    return isinstance(config, dict) and config.get("quantization_config") is not None


def card_hash(directory: Path, name: str) -> str | None:
    """A hash in the table of a model's README.md, as :mod:`mixbits.packing.card` writes it; None if there is none."""
    path = directory / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(_CARD_ROW.format(re.escape(name)), text, flags=re.MULTILINE)
    return found.group(1) if found else None
