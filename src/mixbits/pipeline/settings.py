"""Settings of whole jobs: frozen, validated, from a small YAML file plus ``key=value`` overrides.

``${NAME}`` in a path is an environment variable; an unset one is an error that says so. Unknown keys are errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mixbits.errors import DataError, SpecError
from mixbits.lm.presets import ModelSize
from mixbits.lm.train_settings import TrainSettings
from mixbits.pipeline.search_settings import SearchSettings
from mixbits.spec import DEFAULT_SPECS

Measure = Literal["hessian", "fisher", "kl", "loss"]


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


Method = Literal["straight-through", "admm", "proximal"]


class AdmmSettings(_Frozen):
    """ADMM training; see :class:`mixbits.quant.admm.Admm`. None: what suits the solver."""

    solver: Literal["projected", "adamw", "extragradient", "extragradient-adamw"] = "projected"
    gamma: float | None = Field(None, gt=0)
    gamma_final: float | None = Field(None, gt=0)
    gamma_rule: Literal["constant", "geometric", "residual"] = "geometric"
    num_updates: int | None = Field(None, ge=1)
    lookahead_rate: float = Field(0.02, gt=0)
    descent_rate: float = Field(0.001, gt=0)
    primal_tolerance: float = Field(0.0, ge=0)
    dual_tolerance: float = Field(0.0, ge=0)
    patience: int = Field(3, ge=1)
    dual_step: float = Field(1.0, ge=0, le=1)
    finish_straight_through: float = Field(0.0, ge=0, lt=1)


class ProximalSettings(_Frozen):
    """Proximal annealing; see :class:`mixbits.quant.proximal.Proximal`."""

    kind: Literal["parq", "soft-threshold", "average"] = "parq"
    anneal_start: float = Field(0.0, ge=0, lt=1)
    anneal_end: float = Field(0.6, gt=0, le=1)
    steepness: float = Field(10.0, gt=0, le=100)


class QuantizeSettings(_Frozen):
    """Quantized training of one model: method, length, refinement of scales, biases and norms at the end.

    ``scales``: where straight-through training takes its scales from (`mixbits.quant.qat`); ``scale_learning_rate``: of learned
    ones' logarithms, None is 32 times the training's. ``train`` given in part keeps this group's other defaults, not those of
    full-precision training. ``progressive``: stages (share of the training at which they end, bits) that come before the final specs,
    e.g. ``[[0.2, 8], [0.4, 4]]`` (`mixbits.quant.progressive`).
    """

    method: Method = "straight-through"
    train: TrainSettings = TrainSettings(epochs=3, learning_rate=1.5e-3, teacher_weight=1.0, dropout="off")
    refine_epochs: float = Field(0.5, ge=0)
    refine_learning_rate: float = Field(1e-4, gt=0)
    scales: Literal["learned", "follow", "fixed"] = "learned"
    scale_learning_rate: float | None = Field(None, gt=0)
    progressive: tuple[tuple[float, float], ...] = ()
    admm: AdmmSettings = AdmmSettings()
    proximal: ProximalSettings = ProximalSettings()

    @model_validator(mode="before")
    @classmethod
    def _partial_train(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("train"), Mapping):
            defaults = cls.model_fields["train"].default.model_dump()
            data = {**data, "train": {**defaults, **data["train"]}}
        return data

    @model_validator(mode="after")
    def _only_straight_through(self) -> QuantizeSettings:
        if self.progressive and self.method != "straight-through":
            raise ValueError(f"progressive lowers bits in straight-through training; method is {self.method}")
        return self


class MeasureSettings(_Frozen):
    """Sensitivities: which measure, and the blocks of training text it is taken on; probes are the Hessian's."""

    measure: Measure = "fisher"
    num_probes: int = Field(50, ge=1)
    num_blocks: int = Field(32, ge=1)
    micro_batch: int = Field(4, ge=1)
    specs: tuple[str, ...] = DEFAULT_SPECS
    seed: int = 0


class Row(_Frozen):
    """One quantized model of an experiment: a uniform ``spec``, or learned bits under a budget.

    ``specs``: what learned bits may be chosen from; None is everything that was measured. ``measure``: what they are learned by
    (None: measure.measure); ``prototypes`` takes the experiment's own uniform rows, of each spec the first one with the experiment's
    own method and settings. ``granularity``: what shares a spec.
    ``choice``: what is taken from a search, its most probable specs that fit or the integer program over its marginals.
    ``start``: training starts from the full-precision weights, or each unit from the experiment's own uniform row of its spec, as in the
    papers. ``quantize``: settings of quantized training that differ from the experiment's, e.g. ``{scales: follow}``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    spec: str | None = None
    ratio: float | None = Field(None, gt=0)
    specs: tuple[str, ...] | None = None
    method: Method | None = None
    measure: Measure | Literal["prototypes", "search"] | None = None
    granularity: Literal["matrix", "sublayer", "layer"] = "matrix"
    choice: Literal["one-best", "integer-program"] = "one-best"
    start: Literal["full", "prototypes"] = "full"
    quantize: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of(self) -> Row:
        if (self.spec is None) == (self.ratio is None):
            raise ValueError(f"row {self.name!r} needs exactly one of 'spec' (uniform) and 'ratio' (learned)")
        if self.spec is not None and (self.measure or self.specs or self.granularity != "matrix"):
            raise ValueError(f"row {self.name!r} is uniform: measure, specs and granularity are for learned bits")
        return self

    def settings(self, base: QuantizeSettings) -> QuantizeSettings:
        """``base`` with what this row changes."""
        changes = {**self.quantize, **({"method": self.method} if self.method else {})}
        return QuantizeSettings.model_validate(_merged(base.model_dump(), changes))


class SpeechNgram(_Frozen):
    """An n-gram model of the training text beside the language models: modified Kneser-Ney over the model's words, mixed as in ``mixbits rescore``."""

    order: int = Field(4, ge=1)
    prune: tuple[int, ...] = (0,)
    mode: Literal["interpolate", "log-linear"] = "interpolate"
    weight: float = Field(0.5, ge=0, le=1)


class SpeechLists(_Frozen):
    """n-best lists: weights are tuned on ``dev`` only; ``test`` lists are read once.

    ``max_hypotheses``: only that many from the top of each list; ``interpolate``: "equal" mixes the model with the lists' own LM
    score half and half (:class:`mixbits.pipeline.rescore.ScoreSettings`); ``ngram``: rows ``ngram`` and ``NAME+ngram`` as well.
    """

    dev: str
    test: dict[str, str]
    lower_case: bool = False
    max_hypotheses: int | None = Field(None, ge=1)
    interpolate: Literal["tuned", "equal"] = "tuned"
    ngram: SpeechNgram | None = None


class ExperimentSettings(_Frozen):
    """An experiment: one full-precision model, several quantized ones, one results summary.

    ``compare_measures``: taken as well, for their agreement with each other. With several ``seeds`` all of it is done once a seed (initial weights, order of the data, measuring, training) and averaged.
    """

    title: str
    text: TextFiles
    vocabulary: Vocabulary = Vocabulary()
    model: ModelSize = ModelSize()
    full: TrainSettings = TrainSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    measure: MeasureSettings = MeasureSettings()
    search: SearchSettings = SearchSettings()
    rows: tuple[Row, ...]
    speech: SpeechLists | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    compare_measures: tuple[Measure | Literal["prototypes"], ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentSettings:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names) or {"full", "full-continued", "first-pass"} & set(names):
            raise ValueError("row names must differ from each other and from full, full-continued and first-pass")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}; each may be there once")
        for row in self.rows:
            row.settings(self.quantize)
        if self.full.context != self.model.context or self.quantize.train.context != self.model.context:
            raise ValueError("full.context, quantize.train.context and model.context must be the same number")
        return self

    def for_seed(self, seed: int) -> ExperimentSettings:
        """The experiment with one seed for everything."""
        quantize = self.quantize.model_copy(update={"train": self.quantize.train.model_copy(update={"seed": seed})})
        return self.model_copy(
            update={
                "seed": seed,
                "seeds": (),
                "full": self.full.model_copy(update={"seed": seed}),
                "quantize": quantize,
                "measure": self.measure.model_copy(update={"seed": seed}),
                "search": self.search.model_copy(update={"seed": seed}),
            }
        )


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` put in, group by group."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return result


def _expand(value: Any, where: str, *, unset: Literal["error", "keep"] = "error") -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, f"{where}.{k}", unset=unset) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where, unset=unset) for v in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ and unset == "keep":
            return match.group(0)
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
        folder = value.rstrip(os.sep)  # a number of threads, say, is none
        if name.startswith("MIXBITS_") and os.sep in value and (data == folder or data.startswith(folder + os.sep)):
            return f"${{{name}}}{data[len(folder) :]}"
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


def load_experiment(
    path: str | Path, overrides: tuple[str, ...] = (), *, unset: Literal["error", "keep"] = "error"
) -> ExperimentSettings:
    """Read a recipe; ``unset``: what becomes of environment variables that are not set.

    Raises DataError when the recipe is missing or a variable is not set, SpecError naming the offending key otherwise.
    """
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
    return validate(ExperimentSettings, _expand(data, str(path), unset=unset), where=str(path))


def validate(kind: type[Any], data: Any, *, where: str) -> Any:
    """Build a settings object; pydantic's complaint becomes one SpecError line per key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise SpecError(f"{where}: " + "; ".join(lines)) from None
