"""Settings of whole jobs: frozen, validated, from a small YAML file plus ``key=value`` overrides.

``${NAME}`` in a path is an environment variable; an unset one is an error that says so. Unknown keys are errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixbits.errors import DataError, SpecError
from mixbits.lm.presets import ModelSize
from mixbits.lm.train_settings import TrainSettings


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextFiles(_Frozen):
    """Plain text, one sentence a line. ``train`` may be several files; ``max_train_words`` cuts the training text.

    ``valid`` and ``test`` may also be n-best lists (.jsonl, .jsonl.gz), whose references are then the text.
    """

    train: tuple[str, ...]
    valid: str
    test: str
    max_train_words: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("train"), str):
            data = {**data, "train": [data["train"]]}
        return data


class Vocabulary(_Frozen):
    """Word-level vocabulary cut-offs, or an existing tokenizer directory."""

    max_words: int | None = Field(None, ge=1)
    min_count: int = Field(1, ge=1)
    path: str | None = None


class QuantizeSettings(_Frozen):
    """Quantized training of one model: method, length, refinement of scales, biases and norms at the end."""

    method: Literal["straight-through", "admm"] = "straight-through"
    train: TrainSettings = TrainSettings(epochs=3, learning_rate=3e-4, teacher_weight=0.5)
    refine_epochs: float = Field(0.5, ge=0)
    refine_learning_rate: float = Field(1e-4, gt=0)
    admm_gamma: float = Field(0.1, gt=0)
    admm_gamma_final: float = Field(3.0, gt=0)
    admm_updates: int = Field(10, ge=1)


class MeasureSettings(_Frozen):
    """Hessian sensitivities: probes, and blocks of training text they are taken on."""

    num_probes: int = Field(50, ge=1)
    num_blocks: int = Field(32, ge=1)
    micro_batch: int = Field(4, ge=1)
    specs: tuple[str, ...] = ("1", "1.58", "2", "3", "4", "8")
    seed: int = 0


class Row(_Frozen):
    """One quantized model of an experiment: a uniform ``spec``, or learned bits under a budget.

    ``specs``: what learned bits may be chosen from; None is everything that was measured.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    spec: str | None = None
    ratio: float | None = Field(None, gt=0)
    specs: tuple[str, ...] | None = None
    method: Literal["straight-through", "admm"] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Row:
        if (self.spec is None) == (self.ratio is None):
            raise ValueError(f"row {self.name!r} needs exactly one of 'spec' (uniform) and 'ratio' (learned)")
        return self


class SpeechLists(_Frozen):
    """n-best lists: weights are tuned on ``dev`` only; ``test`` lists are read once."""

    dev: str
    test: dict[str, str]
    lower_case: bool = False


class ExperimentSettings(_Frozen):
    """An experiment: one full-precision model, several quantized ones, one results summary."""

    title: str
    text: TextFiles
    vocabulary: Vocabulary = Vocabulary()
    model: ModelSize = ModelSize()
    full: TrainSettings = TrainSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    measure: MeasureSettings = MeasureSettings()
    rows: tuple[Row, ...]
    speech: SpeechLists | None = None
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentSettings:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names) or {"full", "full-continued", "first-pass"} & set(names):
            raise ValueError("row names must differ from each other and from full, full-continued and first-pass")
        if self.full.context != self.model.context or self.quantize.train.context != self.model.context:
            raise ValueError("full.context, quantize.train.context and model.context must be the same number")
        return self


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise DataError(
                f"{where}: environment variable {name} is not set; set it to the folder that holds the data"
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", replace, value)


def portable(data: Any) -> Any:
    """Settings as plain data whose paths name ``${MIXBITS_...}`` again instead of a folder of this machine."""
    if isinstance(data, Mapping):
        return {k: portable(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [portable(v) for v in data]
    if not isinstance(data, str):
        return data
    for name, value in os.environ.items():
        if name.startswith("MIXBITS_") and value and data.startswith(value):
            return f"${{{name}}}{data[len(value) :]}"
    return data


def _override(data: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator:
        raise SpecError(f"override {text!r} is not key=value; expected e.g. full.epochs=2")
    *path, last = key.split(".")
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise SpecError(f"override {text!r}: {part!r} is not a group of settings")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"override {text!r}: value cannot be read ({str(error).splitlines()[0]})") from None


def load_experiment(path: str | Path, overrides: tuple[str, ...] = ()) -> ExperimentSettings:
    """Read a recipe. Raises DataError when it is missing, SpecError naming the offending key otherwise."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such recipe; expected a YAML file like those in recipes/")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from None
    if not isinstance(data, dict):
        raise SpecError(f"{path}: expected a YAML mapping of settings")
    for text in overrides:
        _override(data, text)
    return validate(ExperimentSettings, _expand(data, str(path)), where=str(path))


def validate(kind: type[Any], data: Any, *, where: str) -> Any:
    """Build a settings object; pydantic's complaint becomes one SpecError line per key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise SpecError(f"{where}: " + "; ".join(lines)) from None
