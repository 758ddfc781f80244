"""The README.md of a packed model: what it is, how large, bits per unit, how to load it, how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(
    model: Any, quantization_config: Mapping[str, Any], units_per_spec: Mapping[str, int], facts: Mapping[str, Any]
) -> str:
    """Markdown text. ``units_per_spec``: number of units per spec; ``facts``: what the caller adds, name -> text or number."""
    q = quantization_config
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [mixbits, quantized, mixed-precision]",
        "---",
        "",
        f"# {_cell(facts.get('title', type(model).__name__ + ', packed by mixbits'))}",
        "",
        f"A `{type(model).__name__}` whose weights are stored in {q['bits_per_weight']:.2f} bits each on average "
        "(scales, biases, norms, embeddings and header included).",
        "",
        "| | |",
        "| --- | --- |",
        f"| weight file | {q['file_bytes']:,} bytes |",
        f"| parameters, ties once | {q['num_parameters']:,} |",
        f"| compression ratio to float32 | {q['compression_ratio']:.2f} |",
        f"| bits per weight | {q['bits_per_weight']:.3f} |",
    ]
    lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if key != "title"]
    lines += [
        "",
        "## Load it",
        "",
        "```python",
        "import mixbits.hf",
        "from transformers import AutoModelForCausalLM",
        "",
    ]
    lines += ['model = AutoModelForCausalLM.from_pretrained("this-directory")', "```", ""]
    lines += [
        'or `mixbits.load("this-directory")`, which reads archived weights (`.gz`) too. Without mixbits, loading raises an error.',
        "",
        "## Bits",
        "",
    ]
    lines += ["| spec | units |", "| --- | --- |"]
    lines += [f"| {spec} | {count} |" for spec, count in sorted(units_per_spec.items())]
    lines += ["", "| unit | spec | outputs x inputs | tied with |", "| --- | --- | --- | --- |"]
    for name, unit in q["units"].items():
        lines.append(f"| {name} | {unit['spec']} | {unit['rows']} x {unit['cols']} | {', '.join(unit['tied'])} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
