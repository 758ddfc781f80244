"""A made-up summary in the shape of a real one. NOT A RESULT: every number here is invented to exercise the report."""

from typing import Any

KINDS = {"self_attn.q_proj": 65536, "self_attn.k_proj": 65536, "self_attn.v_proj": 65536, "self_attn.out_proj": 65536}
KINDS |= {"fc1": 262144, "fc2": 262144}


def unit_weights(num_layers: int) -> dict[str, int]:
    units = {"model.decoder.embed_tokens": 2_560_000}
    for layer in range(num_layers):
        units |= {f"model.decoder.layers.{layer}.{kind}": size for kind, size in KINDS.items()}
    return units


def allocation(low: str, high: str, embedding: str, num_layers: int) -> dict[str, str]:
    units = unit_weights(num_layers)
    chosen = {u: (high if "v_proj" in u or "layers.0" in u else low) for u in units}
    return chosen | {"model.decoder.embed_tokens": embedding}


def row(
    name: str, num_bytes: int | None, bits: float | None, nats: float | None, wer: float, p: float | None, **more: Any
):
    ppl = None if nats is None else 2.718281828**nats
    return {
        "name": name,
        "bytes": num_bytes,
        "ratio": None if num_bytes is None else 22_900_000 / num_bytes,
        "bits_per_weight": bits,
        "ppl": ppl,
        "ppl_stderr": None if ppl is None else ppl * 0.008,
        "wer": wer,
        "p_value_vs_full": p,
        "nats": nats,
    } | more


def example_summary(num_layers: int = 4) -> dict[str, Any]:
    """A fresh copy of the invented summary."""
    quantized = {"method": "straight-through", "epochs": 3, "train_seconds": 212.0}
    sensitivity = {}
    for i, (unit, size) in enumerate(unit_weights(num_layers).items()):
        base = 1e-3 * (1 + (i * 7) % 5) * (size / 65536) ** 0.5
        table = {
            "1-papers-row": base * 4,
            "1.58-papers-row": base * 1.6,
            "2-half-step-row": base,
            "4-papers-row": base / 30,
        }
        sensitivity[unit] = {"trace": 40.0 + i, "trace_stderr": 3.0, "sensitivity": table}
    return {
        "format": "mixbits-summary",
        "format_version": 1,
        "title": "Example of a report (invented numbers)",
        "seed": 1,
        "versions": {"mixbits": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "commit": None, "num_threads": 2},
        "command": "mixbits experiment recipes/example.yaml -o runs/example",
        "data": {"train.txt": "9f" * 32, "test.txt": "0a" * 32},
        "baseline": "full-continued",
        "rows": [
            row("first-pass", None, None, None, 51.84, 0.0004),
            row("full", 22_900_000, 32.0, 4.853, 48.02, None, valid_ppl=131.4, epochs=12, train_seconds=840.0),
            row("full-continued", 22_900_000, 32.0, 4.831, 47.91, 0.61, valid_ppl=128.9, epochs=3, delta_nats=0.0),
            row(
                "uniform-1", 744_512, 1.04, 5.214, 49.92, 0.001, delta_nats=0.383, delta_nats_stderr=0.006, **quantized
            ),
            row(
                "uniform-1.58",
                1_171_200,
                1.64,
                5.021,
                48.81,
                0.08,
                delta_nats=0.190,
                delta_nats_stderr=0.004,
                **quantized,
            ),
            row(
                "uniform-2", 1_460_224, 2.04, 4.937, 48.37, 0.31, delta_nats=0.106, delta_nats_stderr=0.003, **quantized
            ),
            row(
                "uniform-4", 2_886_400, 4.03, 4.846, 47.98, 0.87, delta_nats=0.015, delta_nats_stderr=0.002, **quantized
            ),
            row(
                *("learned-16x", 1_418_240, 1.98, 4.921, 48.22, 0.44),
                **({"delta_nats": 0.090, "delta_nats_stderr": 0.003, "delta_wer_upper_95": 0.62} | quantized),
                errors={"sub": 1510, "del": 402, "ins": 199, "words": 4378},
                significance="not different from full (p = 0.44)",
            ),
            row(
                "learned-20x",
                1_139_968,
                1.59,
                5.013,
                48.93,
                0.06,
                delta_nats=0.182,
                delta_nats_stderr=0.004,
                **quantized,
            ),
        ],
        "equal_bytes": [
            {
                "name": "learned-16x",
                "interpolated_nats": 4.949,
                "nats": 4.921,
                "delta_nats": -0.028,
                "delta_nats_stderr": 0.003,
                "neighbours": ["uniform-1.58", "uniform-2"],
                "verdict": "better than uniform at equal bytes",
            },
            {
                "name": "learned-20x",
                "interpolated_nats": 5.017,
                "nats": 5.013,
                "delta_nats": -0.004,
                "delta_nats_stderr": 0.004,
                "neighbours": ["uniform-1", "uniform-1.58"],
                "verdict": "no measurable difference",
            },
        ],
        "allocations": {
            "learned-16x": allocation("1.58-papers-row", "4-papers-row", "1.58-papers-row", num_layers),
            "learned-20x": allocation("1-papers-row", "3-papers-row", "1.58-papers-row", num_layers),
        },
        "unit_weights": unit_weights(num_layers),
        "sensitivity": {"measure": "hessian", "units": sensitivity},
        "asr": {
            "lists": {
                "dev": {"utterances": 120, "words": 1710, "oracle_wer": 38.9, "first_pass_wer": 52.6},
                "test": {"utterances": 310, "words": 4378, "oracle_wer": 37.45, "first_pass_wer": 51.84},
            },
            "weights": {"full": {"lm_scale": 0.55, "word_insertion_penalty": -0.2}, "learned-16x": {"lm_scale": 0.5}},
            "gain_significant": True,
            "no_loss_rule": "No loss counts only if the upper 95 % bound of the WER difference is at most 20 % of the gain.",
        },
        "notes": ["Every number in this file is invented.", "Test was read once."],
    }
