"""From a full-precision model and an allocation to a packed model: train, project, refine, pack.

Training has two stages, codes and refinement. The result of the first is kept in a file, so that a run that is killed during the
second does not come back to the first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import SpecError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import TokenStream
from mixbits.lm.train import TrainSettings, train_model, training_device
from mixbits.packing.checkpoint import SavedModel, save_packed
from mixbits.pipeline.checks import check_full_precision, check_output, check_text
from mixbits.pipeline.prepare import split_text, training_context
from mixbits.pipeline.rows import figures_log, fingerprint
from mixbits.pipeline.settings import QuantizeSettings
from mixbits.pipeline.workplace import workplace
from mixbits.quant.admm import Admm
from mixbits.quant.grid import dequantize
from mixbits.quant.method import on_cpu, quantize_units, trained_units
from mixbits.quant.progressive import Progressive
from mixbits.quant.proximal import Proximal
from mixbits.quant.qat import StraightThrough
from mixbits.quant.refine import Refine
from mixbits.quant.units import find_units
from mixbits.runs import read_json
from mixbits.spec import BitAllocation, ModelInventory, QuantizedWeight, QuantSpec


def _method(model: Any, inventory: ModelInventory, allocation: BitAllocation, settings: QuantizeSettings) -> Any:
    """The method object of the settings; its options are the fields of the method's own settings."""
    if settings.method == "admm":
        return Admm(model, inventory, allocation, **settings.admm.model_dump())
    if settings.method == "proximal":
        return Proximal(model, inventory, allocation, **settings.proximal.model_dump())
    options: dict[str, Any] = {"scales": settings.scales, "scale_learning_rate": settings.scale_learning_rate}
    if settings.progressive:
        return Progressive(model, inventory, allocation, stages=settings.progressive, **options)
    return StraightThrough(model, inventory, allocation, **options)


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

    ``model`` is changed in place: afterwards its units have the stored values. Checkpoints go to ``folder`` and are resumed
    from. Returns (stored weights per quantized unit, {"valid_nats", "steps", "epochs", "log"}). Refinement that does not lower
    the validation loss is not kept. With no quantized unit nothing is trained.
    """
    model.to(training_device())
    inventory = find_units(model)
    units = trained_units(model, inventory, allocation)
    if not units:
        return {}, {"valid_nats": None, "steps": 0, "epochs": 0.0, "log": []}
    shared: dict[str, Any] = {"teacher": teacher, "resume": True, "show_progress": show_progress}
    weights, found = _train_codes(model, train, valid, inventory, allocation, settings, folder, title=title, **shared)
    record = {
        "valid_nats": found["valid_nats"],
        "steps": found["steps"],
        "epochs": settings.train.epochs,
        "precision": found["precision"],
        "log": figures_log(found["log"]),
    }
    if settings.refine_epochs > 0:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        refine = Refine(model, inventory, allocation, weights)
        finer = train_model(
            model, train, valid, _refine_settings(settings), folder / "refine",
            method=refine, title=f"{title}: refine", **shared,
        )  # fmt: skip
        record["refine_valid_nats"] = finer["valid_nats"]
        if finer["valid_nats"] < found["valid_nats"]:
            weights = refine.quantized()
            record |= {"valid_nats": finer["valid_nats"], "steps": found["steps"] + finer["steps"]}
            record["epochs"] += settings.refine_epochs
        else:
            for name, parameter in model.named_parameters():
                parameter.data = before[name]
    for unit in units:
        unit.put(dequantize(weights[unit.name]))
    model.cpu()
    return {name: on_cpu(weight) for name, weight in weights.items()}, record


def _train_codes(
    model: Any,
    train: TokenStream,
    valid: TokenStream,
    inventory: ModelInventory,
    allocation: BitAllocation,
    settings: QuantizeSettings,
    folder: Path,
    **options: Any,
) -> tuple[dict[str, QuantizedWeight], dict[str, Any]]:
    """The first stage, or its result if it was finished before."""
    path = folder / "codes.pt"
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
        weights = {name: QuantizedWeight(allocation.specs[name], *pair) for name, pair in kept["weights"].items()}
        return weights, kept["found"]
    method = _method(model, inventory, allocation, settings)
    found = train_model(model, train, valid, settings.train, folder / "codes", method=method, **options)
    weights = method.quantized()
    partial = path.with_suffix(".partial")
    pairs = {name: (w.codes, w.scales, w.codebook, w.cols) for name, w in weights.items()}
    torch.save({"model": model.state_dict(), "weights": pairs, "found": found}, partial)
    os.replace(partial, path)
    shutil.rmtree(folder / "codes", ignore_errors=True)
    return weights, found


def _refine_settings(settings: QuantizeSettings) -> TrainSettings:
    changes = {"epochs": settings.refine_epochs, "learning_rate": settings.refine_learning_rate, "warmup_fraction": 0.1}
    return settings.train.model_copy(update=changes)


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
    archive: bool = False,
    overwrite: bool = False,
) -> SavedModel:
    """Write the packed model directory; see :func:`mixbits.packing.checkpoint.save_packed`."""
    options: dict[str, Any] = {"tokenizer": tokenizer, "card": card, "archive": archive, "overwrite": overwrite}
    return save_packed(model, find_units(model), allocation, weights, directory, **options)


def train_and_pack(
    source: Path,
    output: Path,
    allocation: BitAllocation,
    settings: QuantizeSettings | None,
    train: TokenStream,
    valid: TokenStream,
    work: Path,
    *,
    tokenizer: Any,
    source_hash: str,
    teacher: Any = None,
    start: Mapping[str, torch.Tensor] | None = None,
    title: str = "quantized",
    show_progress: bool = True,
) -> tuple[SavedModel, dict[str, Any]]:
    """Train the model directory ``source`` quantized, and pack it as ``output``: a row of an experiment, or of ``compress``.

    ``settings``: None only rounds to the nearest codes; ``teacher``: where settings need one (default: ``source``, loaded); ``start``:
    other weights to start from than ``source``'s. Returns the packed model and what training found (:func:`train_quantized`).
    """
    student, record = load_model(source)[0], dict[str, Any]()
    if start is not None:
        student.load_state_dict(start)
    if settings is None:
        weights = round_to_nearest(student, allocation)
    else:
        if settings.train.needs_teacher and teacher is None:
            teacher = load_model(source)[0]
        weights, record = train_quantized(
            student, train, valid, allocation, settings, work,
            teacher=teacher if settings.train.needs_teacher else None, title=title, show_progress=show_progress,
        )  # fmt: skip
    method = "round to nearest" if settings is None else settings.method
    card = {"source model sha256": source_hash, "training text sha256": train.sha256, "method": method}
    return pack(student, tokenizer, allocation, weights, output, card=card, overwrite=True), record


def quantize_model(
    model: str | Path,
    output: str | Path,
    *,
    settings: QuantizeSettings,
    allocation: str | Path | None = None,
    spec: str | None = None,
    text: str | Path | None = None,
    valid: str | Path | None = None,
    archive: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> SavedModel:
    """Quantize a model directory under an allocation file (or one ``spec`` for all units) and write a packed one.

    Without ``text`` the weights are only rounded. ``archive`` keeps the weight files compressed where that saves 3 %. Checkpoints lie in ``<output>.work`` until it is done; an interrupted call is
    resumed by the same call. Raises DataError (``output`` in use, by another process too, broken model, unfit text), SpecError (wrong allocation).
    """
    model, output = Path(model), Path(output)
    check_output(output, model, overwrite=overwrite)
    if (allocation is None) == (spec is None):
        raise SpecError("give exactly one of an allocation file and a spec for all units")
    student, tokenizer = load_model(model)
    check_full_precision(student, model)
    inventory = find_units(student)
    if spec is not None:
        bits = BitAllocation.uniform(inventory, QuantSpec.parse(spec))
    else:
        assert allocation is not None
        bits = BitAllocation.from_json(read_json(allocation), where=str(allocation))
    bits.check(inventory)
    full_hash = model_hash(model)
    card = {"source model sha256": full_hash, "method": settings.method if text else "round to nearest"}
    if text is None:
        weights = round_to_nearest(student, bits)
        return pack(student, tokenizer, bits, weights, output, card=card, archive=archive, overwrite=overwrite)
    context = training_context(student)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"context": context})})
    stream, held_out = split_text(tokenizer, text, valid)
    check_text(stream, context, text)
    check_text(held_out, context, valid or f"{text} (held-out part)")
    key = fingerprint(
        "quantize", full_hash, bits.to_json()["specs"], settings.model_dump(), stream.sha256, held_out.sha256
    )
    card["training text sha256"] = stream.sha256
    with workplace(output, key) as work:
        teacher = load_model(model)[0] if settings.train.needs_teacher else None
        weights, _ = train_quantized(
            student, stream, held_out, bits, settings, work, teacher=teacher, show_progress=show_progress
        )
        return pack(student, tokenizer, bits, weights, output, card=card, archive=archive, overwrite=overwrite)
