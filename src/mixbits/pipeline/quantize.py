"""From a full-precision model and an allocation to a packed model: train, project, refine, pack."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mixbits.errors import DataError, SpecError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream
from mixbits.lm.train import TrainSettings, train_model
from mixbits.packing.checkpoint import SavedModel, save_packed
from mixbits.pipeline.prepare import split_text, training_context
from mixbits.pipeline.settings import QuantizeSettings
from mixbits.quant.admm import Admm
from mixbits.quant.method import quantize_units, trained_units
from mixbits.quant.qat import StraightThrough
from mixbits.quant.refine import Refine
from mixbits.quant.units import find_units
from mixbits.runs import read_json
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight, QuantSpec


def _method(model: Any, inventory: ModelInventory, allocation: BitAllocation, settings: QuantizeSettings) -> Any:
    if settings.method == "straight-through":
        return StraightThrough(model, inventory, allocation)
    return Admm(
        model,
        inventory,
        allocation,
        gamma=settings.admm_gamma,
        gamma_final=settings.admm_gamma_final,
        num_updates=settings.admm_updates,
    )


def train_quantized(
    model: Any,
    train: TokenStream,
    valid: TokenStream,
    allocation: BitAllocation,
    settings: QuantizeSettings,
    folder: Path,
    *,
    teacher: Any = None,
    title: str = "quantized",
    show_progress: bool = True,
) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
    """Train ``model``'s units on their grids, then refine scales, biases and norms around fixed codes.

    ``model`` is changed in place; checkpoints go to ``folder`` and are resumed from. Returns (stored weights per quantized
    unit, {"valid_nats", "steps", "epochs", "log"}). Refinement that does not lower the validation loss is not kept.
    """
    inventory = find_units(model)
    allocation.check(inventory)
    if not any(spec.is_quantized for spec in allocation.specs.values()):
        return {}, {"valid_nats": None, "steps": 0, "epochs": 0.0, "log": []}
    method = _method(model, inventory, allocation, settings)
    found = train_model(
        model, train, valid, settings.train, folder / "codes",
        method=method, teacher=teacher, resume=True, title=title, show_progress=show_progress,
    )  # fmt: skip
    weights: dict[str, QuantizedWeight] = method.quantized()
    record = {
        "valid_nats": found["valid_nats"],
        "steps": found["steps"],
        "epochs": settings.train.epochs,
        "log": _log(found),
    }
    if settings.refine_epochs > 0:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        refine = Refine(model, inventory, allocation, weights)
        finer = train_model(
            model, train, valid, _refine_settings(settings), folder / "refine",
            method=refine, teacher=teacher, resume=True, title=f"{title}: refine", show_progress=show_progress,
        )  # fmt: skip
        record["refine_valid_nats"] = finer["valid_nats"]
        if finer["valid_nats"] < found["valid_nats"]:
            weights = refine.quantized()
            record |= {"valid_nats": finer["valid_nats"], "steps": found["steps"] + finer["steps"]}
            record["epochs"] += settings.refine_epochs
        else:
            for name, parameter in model.named_parameters():
                parameter.data = before[name]
    return weights, record


def _refine_settings(settings: QuantizeSettings) -> TrainSettings:
    changes = {"epochs": settings.refine_epochs, "learning_rate": settings.refine_learning_rate, "warmup_fraction": 0.1}
    return settings.train.model_copy(update=changes)


def _log(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "epoch"} for entry in found["log"] if "loss" not in entry]


def round_to_nearest(model: Any, allocation: BitAllocation) -> dict[str, QuantizedWeight]:
    """Quantize without training: every unit projected on its grid."""
    return quantize_units(trained_units(model, find_units(model), allocation))


def pack(
    model: Any,
    tokenizer: Any,
    allocation: BitAllocation,
    weights: dict[str, QuantizedWeight],
    directory: Path,
    *,
    card: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> SavedModel:
    """Write the packed model directory; see :func:`mixbits.packing.checkpoint.save_packed`."""
    return save_packed(
        model, find_units(model), allocation, weights, directory, tokenizer=tokenizer, card=card, overwrite=overwrite
    )


def quantize_model(
    model: str | Path,
    output: str | Path,
    *,
    settings: QuantizeSettings,
    allocation: str | Path | None = None,
    spec: str | None = None,
    text: str | Path | None = None,
    valid: str | Path | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> SavedModel:
    """Quantize a model directory under an allocation file (or one ``spec`` for all units) and write a packed one.

    Without ``text`` the weights are only rounded. Checkpoints lie in ``<output>.work`` until it is done.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise DataError(f"{output}: exists already; choose another output folder or give --overwrite")
    if (allocation is None) == (spec is None):
        raise SpecError("give exactly one of an allocation file and a spec for all units")
    student, tokenizer = load_model(model)
    inventory = find_units(student)
    if spec is not None:
        bits = BitAllocation.uniform(inventory, QuantSpec.parse(spec))
    else:
        assert allocation is not None
        bits = BitAllocation.from_json(read_json(allocation), where=str(allocation))
    bits.check(inventory)
    work = output.with_name(output.name + ".work")
    card = {"source model sha256": model_hash(model), "method": settings.method if text else "round to nearest"}
    if text is None:
        weights = round_to_nearest(student, bits)
    else:
        train = settings.train.model_copy(update={"context": training_context(student)})
        settings = settings.model_copy(update={"train": train})
        stream, held_out = split_text(tokenizer, text, valid)
        teacher = load_model(model)[0] if train.teacher_weight else None
        weights, _ = train_quantized(
            student, stream, held_out, bits, settings, work, teacher=teacher, show_progress=show_progress
        )
        card["training text sha256"] = stream.sha256
    saved = pack(student, tokenizer, bits, weights, output, card=card, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return saved
