"""Sensitivities of an experiment: taken when a row first asks for them, kept in a file each, by any of the measures.

``prototypes`` is measured on the experiment's own uniform rows (trained, packed, read back), ``search`` trains a super-net under
the row's own budget; all others are of the full-precision model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixbits.errors import SpecError
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import token_batches
from mixbits.packing.modules import PackedUnit
from mixbits.pipeline.measure import measure_stream
from mixbits.pipeline.prepare import PreparedText
from mixbits.pipeline.rows import TrainedRow, fingerprint
from mixbits.pipeline.search import search_precisions
from mixbits.pipeline.search_settings import SearchSettings
from mixbits.pipeline.settings import ExperimentSettings, Row
from mixbits.quant.measures.prototypes import measure_prototypes
from mixbits.quant.sensitivity import Sensitivities, read_sensitivities, write_sensitivities
from mixbits.quant.units import as_matrix, find_units, unit_matrices, unit_parameters
from mixbits.runs import read_json, write_json
from mixbits.spec import BitAllocation, ModelInventory, QuantSpec, Unit


@dataclass
class Measuring:
    """The measurements of one run; ``found`` holds those taken so far. ``trained`` is the run's own, growing, table of rows."""

    settings: ExperimentSettings
    text: PreparedText
    inventory: ModelInventory
    full: TrainedRow
    folder: Path
    trained: Mapping[str, TrainedRow]
    show_progress: bool = True
    found: dict[str, Sensitivities] = field(default_factory=dict)

    def for_row(self, row: Row) -> Sensitivities:
        """What the row's bits are learned from. Raises SpecError when prototypes are missing."""
        name = row.measure or self.settings.measure.measure
        return self._search(row) if name == "search" else self.by(name)

    def by(self, name: str) -> Sensitivities:
        """Sensitivities by one measure, from its file if it was taken before."""
        if name not in self.found:
            self.found[name] = self._prototypes() if name == "prototypes" else self._measure(name)
        return self.found[name]

    def _measure(self, name: str) -> Sensitivities:
        settings = self.settings.measure.model_copy(update={"measure": name})
        key = fingerprint(model_hash(self.full.model), settings.model_dump(), self.text.train.sha256)
        path = self.folder / f"sensitivities-{name}-{key[:12]}.json"
        if path.is_file():
            return read_sensitivities(path)
        model, _ = load_model(self.full.model)
        found = measure_stream(
            model, self.text.train, settings, context=self.settings.model.context, show_progress=self.show_progress
        )
        write_sensitivities(path, found)
        return found

    def uniform_rows(self) -> dict[QuantSpec, TrainedRow]:
        """The prototypes trained so far. Raises SpecError when there are fewer than two."""
        rows = prototype_rows(self.settings)
        found = {spec: self.trained[row.name] for spec, row in rows.items() if row.name in self.trained}
        if len(found) < 2:
            raise SpecError(
                "prototypes are trained uniform rows; give at least two rows with 'spec' and the experiment's own method and settings"
            )
        return found

    def prototype_hashes(self) -> dict[str, str]:
        """Spec -> hash of the uniform model to start from."""
        return {str(spec): model_hash(row.model) for spec, row in self.uniform_rows().items()}

    def prototypes(self) -> dict[QuantSpec, dict[str, torch.Tensor]]:
        """Spec -> state dict of the uniform model, with ordinary layers."""
        return {spec: unpacked(row.model, self.full.model).state_dict() for spec, row in self.uniform_rows().items()}

    def _prototypes(self) -> Sensitivities:
        rows, hashes = self.uniform_rows(), self.prototype_hashes()
        key = fingerprint("prototypes", hashes, self.settings.measure.model_dump(), self.text.train.sha256)
        path = self.folder / f"sensitivities-prototypes-{key[:12]}.json"
        if path.is_file():
            return read_sensitivities(path)
        base = max(rows, key=lambda spec: spec.bit_width)
        measure = self.settings.measure
        batches = token_batches(
            self.text.train,
            context=self.settings.model.context,
            num_blocks=measure.num_blocks,
            micro_batch=measure.micro_batch,
            seed=measure.seed,
        )
        found = measure_prototypes(
            unpacked(rows[base].model, self.full.model),
            self.inventory,
            batches,
            tuple(rows),
            seed=measure.seed,
            prototypes={spec: unit_weights(load_model(row.model)[0], self.inventory) for spec, row in rows.items()},
            base=base,
            untrained=_kept_wider(self.inventory, rows),
            show_progress=self.show_progress,
            provenance={"prototypes": hashes, "text_sha256": self.text.train.sha256},
        )
        write_sensitivities(path, found)
        return found

    def searched(self, row: Row) -> BitAllocation:
        """The super-net's most probable specs that fit the row's budget (1-best, as in the papers)."""
        _, path = self._search_files(row)
        self._search(row)
        return BitAllocation.from_json(read_json(path), where=str(path))

    def _search_settings(self, row: Row) -> SearchSettings:
        candidates = row.specs or self.settings.search.candidates
        return self.settings.search.model_copy(
            update={"ratio": row.ratio, "candidates": candidates, "granularity": row.granularity}
        )

    def _search_files(self, row: Row) -> tuple[Path, Path]:
        """Where a search leaves its sensitivities and its 1-best allocation."""
        settings = self._search_settings(row)
        key = fingerprint("search", model_hash(self.full.model), settings.model_dump(), self.text.hashes)[:12]
        return self.folder / f"sensitivities-search-{key}.json", self.folder / f"allocation-search-{key}.json"

    def _search(self, row: Row) -> Sensitivities:
        """A super-net trained under the row's own budget, with the super-net settings of the experiment."""
        settings = self._search_settings(row)
        path, best = self._search_files(row)
        if not (path.is_file() and best.is_file()):
            work = self.folder / path.stem
            teacher = load_model(self.full.model)[0] if settings.teacher_weight else None
            result = search_precisions(
                load_model(self.full.model)[0], self.text.train, self.text.valid, settings, work,
                context=self.settings.model.context, teacher=teacher, title=f"{row.name}: search",
                show_progress=self.show_progress,
            )  # fmt: skip
            write_json(best, result.one_best.to_json())
            write_sensitivities(path, result.sensitivities)
            shutil.rmtree(work, ignore_errors=True)
        self.found["search"] = read_sensitivities(path)
        return self.found["search"]


def prototype_rows(settings: ExperimentSettings) -> dict[QuantSpec, Row]:
    """The experiment's prototypes: per spec the first uniform row with the experiment's own method and settings, from full precision.

    Other rows of the same spec (another method, other settings, a start from prototypes, or simply later) are not prototypes.
    """
    own, found = settings.quantize, dict[QuantSpec, Row]()
    for row in settings.rows:
        if row.spec is not None and row.start == "full" and row.settings(own) == own:
            found.setdefault(QuantSpec.parse(row.spec), row)
    return found


def _kept_wider(inventory: ModelInventory, specs: Iterable[QuantSpec]) -> list[str]:
    """Units that some uniform model stores otherwise than its spec says: position tables."""
    uniform = [(spec, BitAllocation.uniform(inventory, spec).specs) for spec in specs]
    return [u.name for u in inventory.units if any(stored[u.name] != spec for spec, stored in uniform)]


def unit_weights(model: Any, inventory: ModelInventory) -> dict[str, torch.Tensor]:
    """Unit name -> (rows, cols) float32 weight of a loaded model, packed or not, with the units of ``inventory``."""
    plain = unit_matrices(model, ModelInventory(tuple(_unpacked_units(model, inventory)), ()))
    found = {}
    for unit in inventory.units:
        module = model.get_submodule(unit.name)
        if isinstance(module, PackedUnit):
            weight = module.matrix(torch.float32)
            found[unit.name] = weight.T.contiguous() if unit.kind == "conv1d" else weight
        else:
            found[unit.name] = plain[unit.name]
    return found


def _unpacked_units(model: Any, inventory: ModelInventory) -> list[Unit]:
    return [u for u in inventory.units if not isinstance(model.get_submodule(u.name), PackedUnit)]


def unpacked(packed: Path, full: Path) -> Any:
    """The packed model with ordinary float32 layers: the full-precision model's own, filled with the packed one's values."""
    model, _ = load_model(full)
    inventory = find_units(model)
    other, _ = load_model(packed)
    with torch.no_grad():
        state = {name: tensor for name, tensor in other.state_dict().items() if tensor.is_floating_point()}
        owned = {unit.weight for unit in inventory.units}
        for name, parameter in model.named_parameters():
            if name not in owned:
                parameter.copy_(state[name])
        weights = unit_weights(other, inventory)
        parameters = unit_parameters(model, inventory)
        for unit in inventory.units:
            parameters[unit.name].copy_(as_matrix(weights[unit.name], unit.kind))
    return model
