"""A certificate as one self-contained HTML page: verdict on top, the figures, what was tested. Computes nothing but rounding."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mixbits import __version__
from mixbits.jsonfile import write_text
from mixbits.report.cells import DASH, number, p_text, printable, with_error

TEMPLATE = "certificate.html.j2"
_SYSTEMS = {
    "first-pass": "first pass",
    "first-pass-tuned": "first pass, tuned without a language model",
    "full": "full precision",
    "packed": "packed",
}


def render_certificate(certificate: Mapping[str, Any], out_html: str | Path) -> Path:
    """Write the page of a certificate (:func:`mixbits.pipeline.certify.certify`); returns its path."""
    return write_text(out_html, certificate_page(certificate))


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """The page as text. Every text of the certificate is made printable and escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = resources.files("mixbits.report").joinpath("templates").joinpath(TEMPLATE).read_text(encoding="utf-8")
    c = _cleaned(certificate)
    return environment.from_string(text).render(
        c=c,
        perplexity=_perplexity_rows(c["perplexity"], c["settings"]),
        lists=[_list_section(name, entry, _level(c["settings"])) for name, entry in c["lists"].items()],
        size=_size_rows(c["models"]),
        tested=_tested_rows(c),
        version=__version__,
    )


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(key): _cleaned(item) for key, item in value.items()}
    return [_cleaned(item) for item in value] if isinstance(value, list) else value


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{number(100 * share, 2, sign=True)} %"


def _interval(bounds: list[float | None], *, percent: bool = False) -> str:
    low, high = ((_percent(b) if percent else number(b, 2, sign=True)) for b in bounds)
    return f"{low} to {high}"


def _level(settings: Mapping[str, Any]) -> str:
    return f"{100 * (1 - settings['alpha']):g} %"


def _perplexity_rows(part: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    level = _level(settings)
    return [
        ("full precision", with_error(part["full"]["ppl"], part["full"]["ppl_stderr"])),
        ("packed", with_error(part["packed"]["ppl"], part["packed"]["ppl_stderr"])),
        ("difference, nats per token", with_error(part["delta_nats"], part["delta_nats_stderr"], 4, sign=True)),
        ("change of perplexity", _percent(part["ppl_change"])),
        (f"its {level} interval", _interval(part["ppl_change_interval"], percent=True)),
        (f"its upper {level} bound", _percent(part["ppl_change_upper"])),
        ("allowed (margin)", _percent(settings["margin_ppl"])),
        ("p, one-sided: worse", p_text(part["p_worse"])),
        ("p, Holm", p_text(part["p_worse_holm"])),
        ("tokens, sentences", f"{part['num_tokens']:,}, {part['num_sentences']:,}"),
        ("window, stride", f"{part['context']}, {part['stride']}"),
    ]


def _list_section(name: str, part: Mapping[str, Any], level: str) -> dict[str, Any]:
    """What the template shows of one list."""
    changed = part["changed"]
    systems = [
        [_SYSTEMS.get(system, system), number(entry["wer"]), *(f"{entry[key]:,}" for key in ("sub", "del", "ins"))]
        for system, entry in part["systems"].items()
    ]
    blocks = "blocks (speakers or conversations)" if part["bootstrap_blocked"] else "utterances"
    facts = [
        ("packed less full, points", number(part["delta_wer"], 2, sign=True)),
        (f"{level} interval, paired bootstrap", _interval(part["delta_wer_interval"])),
        (
            f"upper {level} bound; of bootstrap, of score",
            "; ".join(number(part[f"delta_wer_upper{key}"], 2, sign=True) for key in ("", "_bootstrap", "_score")),
        ),
        ("allowed: 20 % of the gain", number(part["allowed_loss"])),
        (f"upper {level} bound of the loss less 20 % of the gain", number(part["loss_over_allowed_upper"], 2, sign=True)),
        ("MAPSSWE p, two-sided; segments", f"{p_text(part['mapsswe_p_value'])}; {part['mapsswe_segments']:,}"),
        ("p, Holm", p_text(part["p_worse_holm"])),
        ("gain of full precision over the first pass", number(part["gain"], 2, sign=True)),
        ("p of that gain; over the tuned first pass", f"{p_text(part['gain_p_value'])}; {p_text(part['gain_over_tuned_p_value'])}"),
        ("bootstrap draws", f"{part['bootstrap_blocks']:,} {blocks}"),
        (
            "one-bests changed",
            f"{changed['changed']:,} of {changed['utterances']:,}: {changed['better']:,} better, {changed['worse']:,} worse, "
            f"{changed['same_errors']:,} with as many errors",
        ),
        ("words; oracle WER %", f"{part['words']:,}; {number(part['oracle_wer'])}"),
    ]  # fmt: skip
    return {"name": name, "verdict": part["verdict"], "reason": part["reason"], "systems": systems, "facts": facts}


def _size_rows(models: Mapping[str, Any]) -> list[tuple[str, str]]:
    full, packed = models["full"], models["packed"]
    on_disk = packed.get("disk_bytes", packed["file_bytes"])
    archived = f" (archived: {on_disk:,})" if on_disk != packed["file_bytes"] else ""
    return [
        ("full precision, 4 bytes a parameter", f"{full['float32_bytes']:,} bytes ({full['num_parameters']:,} parameters)"),
        ("its weight files on disk", f"{full['file_bytes']:,} bytes"),
        ("packed weight files on disk" if packed["packed"] else "second model on disk (not packed)", f"{packed['file_bytes']:,} bytes{archived}"),
        ("smaller than float32", f"{number(models['compression_ratio'])} times"),
        ("smaller than the stored file", f"{number(models['stored_ratio'])} times"),
    ]  # fmt: skip


def _tested_rows(c: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Hashes, seed, settings and versions as (name, value)."""
    inputs = c["inputs"]
    rows = [
        ("certificate", c["compared_sha256"]),
        ("full model", c["models"]["full"]["sha256"]),
        ("packed model", c["models"]["packed"]["sha256"]),
        ("made from", c["models"]["packed"]["source_sha256"]),
        ("text", inputs["text_sha256"]),
        ("dev list", inputs["dev_sha256"]),
        *((f"list {name}", value) for name, value in inputs["lists_sha256"].items()),
        ("seed", str(c["seed"])),
        *((name.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)) for name, value in c["settings"].items()),
        *((name, str(value)) for name, value in c["made_with"]["versions"].items() if value is not None),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value is not None]
