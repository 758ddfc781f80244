"""Neural LM scores of n-best lists from a model directory: vocabulary check, tries, and a cache on disk.

A hypothesis is scored as the training text was: boundary token, the text's tokens, boundary token. A word outside the
vocabulary gets the probability of ``<unk>`` (whatever the tokenizer makes of it; :mod:`mixbits.pipeline.unknown` may add to it) and is
counted, so that tuning can set a penalty for each. A list of which most words are unknown is refused: vocabulary and list do not belong together.

The cache holds one file per model and lists; its key covers the weight, configuration and tokenizer files, the texts, their
case, what stands before them and the way of scoring. Limit: a tokenizer without ``<unk>`` (byte-level BPE) knows every word, so a wrong case goes unnoticed there.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mixbits.asr.nbest import NBest
from mixbits.asr.rescore import DEFAULT_MAX_TOKENS, LmFeatures, lm_features
from mixbits.asr.score_plan import LongHypotheses
from mixbits.errors import DataError, SpecError
from mixbits.jsonfile import read_json
from mixbits.lm.checkpoint import load_model, model_hash
from mixbits.lm.corpus import boundary_id, encode_lines
from mixbits.lm.forest import ForestScorer, SequenceScorer
from mixbits.lm.tokenizer import load_tokenizer
from mixbits.pipeline.unknown import UnknownPolicy, unknown_word_scores
from mixbits.runs import hash_file, hash_text

_CACHE_VERSION = 2
DEFAULT_HISTORY_TOKENS = 64
_ENCODE_BATCH = 4096
_MAX_UNKNOWN_SHARE = 0.5

Scoring = Literal["trie", "one-by-one"]
Runtime = Literal["auto", "int8", "float32", "pytorch"]
"""What computes the scores of tries: the native engine with activations in 8 bits or float32, or PyTorch; ``auto``: the engine with 8 bits
for a packed model that it can run, PyTorch for every other."""


class SpeechModel:
    """A language model for rescoring, full precision or packed; its weights are read when first needed.

    Args:
        source: a model directory, or (model, tokenizer), which then has no hash and no cached scores.

    Raises:
        DataError: no model directory (seen at once, not after other models have been scored).
    """

    def __init__(self, source: str | Path | tuple[Any, Any]) -> None:
        self.directory = None if isinstance(source, tuple) else Path(source)
        self._loaded = source if isinstance(source, tuple) else None
        self._scorers: dict[Runtime, Any] = {}
        if self.directory is not None and not (self.directory / "config.json").is_file():
            raise DataError(f"{self.directory}: no config.json; expected a Hugging Face model directory, packed or not")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self.directory is None:
            assert self._loaded is not None
            return self._loaded[1]
        return load_tokenizer(self.directory)

    @cached_property
    def model(self) -> Any:
        """The transformers model, packed layers keeping their unpacked matrices."""
        if self.directory is None:
            assert self._loaded is not None
            return self._loaded[0]
        import mixbits.hf  # noqa: F401 (registers packed models with transformers)
        from mixbits.packing.archive import unarchived
        from mixbits.packing.modules import set_weight_cache

        with unarchived(self.directory) as directory:
            model, _ = load_model(directory)
        set_weight_cache(model)
        return model

    def runtime(self, wanted: Runtime, scoring: Scoring) -> Runtime:
        """What ``auto`` means for this model. Raises SpecError when the engine is asked for and cannot run it."""
        if scoring != "trie" or wanted == "pytorch":
            if wanted in ("int8", "float32"):
                raise SpecError(
                    f"runtime {wanted} is the native engine, which scores tries; leave {scoring} out or use pytorch"
                )
            return "pytorch"
        reason = self._why_no_engine()
        if reason is None:
            return "int8" if wanted == "auto" else wanted
        if wanted == "auto":
            return "pytorch"
        raise SpecError(f"{self.directory}: the native engine cannot run this model: {reason}; use runtime pytorch")

    def _why_no_engine(self) -> str | None:
        from mixbits.engine import unsupported

        if self.directory is None:
            return "it is in memory, not a directory"
        config = read_json(self.directory / "config.json")
        quantization = config.get("quantization_config") if isinstance(config, dict) else None
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "mixbits":
            return "it is not packed"
        return unsupported(self.directory)

    def score_forest(self, runtime: Runtime) -> Any:
        """Callable, forest -> log-probability of each node, for a runtime other than ``auto``."""
        if runtime not in self._scorers:
            if runtime == "pytorch":
                self._scorers[runtime] = ForestScorer(self.model)
            else:
                from mixbits.engine import Engine

                assert self.directory is not None
                assert runtime != "auto"
                self._scorers[runtime] = Engine(self.directory, activations=runtime)
        return self._scorers[runtime]

    @cached_property
    def model_hash(self) -> str | None:
        """SHA-256 over the weight files; None for a model in memory."""
        return None if self.directory is None else model_hash(self.directory)

    @cached_property
    def fingerprint(self) -> str | None:
        """Hash of everything in the directory that decides a score; None for a model in memory."""
        if self.directory is None:
            return None
        names = (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
        )
        files = [hash_file(self.directory / name) for name in names if (self.directory / name).is_file()]
        return hash_text(" ".join([str(self.model_hash), *files]))


def neural_features(
    model: SpeechModel | str | Path | tuple[Any, Any],
    lists: Sequence[NBest],
    *,
    lower_case: bool = False,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    scoring: Scoring = "trie",
    runtime: Runtime = "auto",
    merge_order: int | None = None,
    long_hypotheses: LongHypotheses = "refuse",
    unknown_policy: UnknownPolicy = "penalty",
    num_unknown_types: int | None = None,
    earlier: Sequence[Sequence[str]] | None = None,
    max_history_tokens: int = DEFAULT_HISTORY_TOKENS,
    cache: str | Path | None = None,
    progress: bool = False,
) -> LmFeatures:
    """Score every hypothesis of every list.

    Args:
        lower_case: give the model the texts in lower case (the lists themselves are left as they are).
        max_tokens: bound on model positions at once.
        scoring: ``one-by-one`` for models that cannot score tries (the error of ``trie`` says so).
        runtime: what computes, see :data:`Runtime`.
        merge_order, long_hypotheses: see :func:`mixbits.asr.rescore.lm_features`.
        unknown_policy, num_unknown_types: see :mod:`mixbits.pipeline.unknown`.
        earlier: for each list the texts before it, earliest first, of which the model sees the last ``max_history_tokens`` tokens; the
            share of unknown words is then the caller's to check (:func:`check_words`).
        cache: folder of kept scores; a second call with the same model and texts reads them.

    Raises:
        DataError: more than half of the words are unknown to the model, or a hypothesis is longer than it takes (named).
        SpecError: the model cannot score tries, or the runtime asked for cannot run it.
    """
    if not isinstance(model, SpeechModel):
        model = SpeechModel(model)
    texts = [_cased(hypothesis.text, lower_case) for entry in lists for hypothesis in entry.hypotheses]
    before = None if earlier is None else [[_cased(text, lower_case) for text in some] for some in earlier]
    runtime = model.runtime(runtime, scoring)
    way: list[object] = [scoring, runtime, merge_order, long_hypotheses, unknown_policy, num_unknown_types]
    way += [] if before is None else [max_history_tokens, before]
    kept = _cache_file(model, lists, texts, repr(way), cache)
    if kept is not None and (found := _read_cache(kept, len(texts))) is not None:
        return found
    unknown = unknown_words(model.tokenizer, texts)
    if before is None:  # with history, lists may come one by one: the caller looks at them together
        check_vocabulary(model.tokenizer, texts, unknown, lower_case=lower_case)
    added = unknown_word_scores(unknown_policy, unknown, model.tokenizer, num_types=num_unknown_types)
    ids = encode_texts(model.tokenizer, texts)
    features = lm_features(
        lists,
        encode=lambda text: ids[_cased(text, lower_case)],
        score_forest=model.score_forest(runtime) if scoring == "trie" else None,
        score_hypotheses=SequenceScorer(model.model) if scoring == "one-by-one" else None,
        count_unknown=lambda text: sum(word in unknown for word in _cased(text, lower_case).split()),
        max_tokens_per_forest=max_tokens,
        contexts=None if before is None else _contexts(model.tokenizer, before, max_history_tokens),
        long_hypotheses=long_hypotheses,
        merge_order=merge_order,
        progress=progress,
    )
    if unknown_policy != "penalty":
        more = np.array([sum(added.get(word, 0.0) for word in text.split()) for text in texts])
        features = replace(features, neural_lm_score=features.neural_lm_score + more)
    if kept is not None:
        _write_cache(kept, features)
    return features


def _contexts(tokenizer: Any, earlier: Sequence[Sequence[str]], max_tokens: int) -> list[list[int]]:
    """A boundary, then the last ``max_tokens`` ids of the earlier texts, a boundary after each."""
    ids = encode_texts(tokenizer, (text for some in earlier for text in some))
    boundary = boundary_id(tokenizer)
    contexts = []
    for some in earlier:
        tail = [token for text in some for token in ids[text][1:]]
        contexts.append([boundary, *(tail[-max_tokens:] if max_tokens > 0 else [])])
    return contexts


def encode_texts(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """Ids of each distinct text, between two boundary tokens. Raises DataError when the tokenizer has no boundary."""
    boundary = boundary_id(tokenizer)
    distinct = list(dict.fromkeys(texts))
    encoded = {}
    for start in range(0, len(distinct), _ENCODE_BATCH):
        batch = distinct[start : start + _ENCODE_BATCH]
        rows = encode_lines(tokenizer, batch)
        encoded.update({text: [boundary, *row, boundary] for text, row in zip(batch, rows, strict=True)})
    return encoded


def unknown_words(tokenizer: Any, texts: Iterable[str]) -> frozenset[str]:
    """The distinct words that the tokenizer turns into ``<unk>``, wholly or in part; none if it has no ``<unk>``."""
    unknown_id = tokenizer.unk_token_id
    if unknown_id is None or unknown_id == boundary_id(tokenizer):
        return frozenset()
    words = {word for text in texts for word in text.split()}
    encoded = encode_texts(tokenizer, sorted(words))
    return frozenset(word for word, ids in encoded.items() if unknown_id in ids)


def unknown_share(tokenizer: Any, texts: Sequence[str], *, lower_case: bool = False) -> float:
    """Share of running words outside the vocabulary; 0 for no words."""
    texts = [_cased(text, lower_case) for text in texts]
    return _share(texts, unknown_words(tokenizer, texts))


def check_words(tokenizer: Any, lists: Sequence[NBest], *, lower_case: bool) -> None:
    """:func:`check_vocabulary` over all hypotheses."""
    texts = [_cased(hypothesis.text, lower_case) for entry in lists for hypothesis in entry.hypotheses]
    check_vocabulary(tokenizer, texts, unknown_words(tokenizer, texts), lower_case=lower_case)


def check_vocabulary(tokenizer: Any, texts: Sequence[str], unknown: frozenset[str], *, lower_case: bool) -> None:
    """Raise DataError when more than half of all running words are unknown; the message shows the way out."""
    share = _share(texts, unknown)
    if share <= _MAX_UNKNOWN_SHARE:
        return
    counts = Counter(word for text in texts for word in text.split() if word in unknown)
    examples = ", ".join(repr(word[:30]) for word, _ in counts.most_common(5))
    hint = "use a model that was trained on such words"
    for case, change in (("lower", str.lower), ("upper", str.upper)):
        changed = [change(text) for text in texts]
        if (other := _share(changed, unknown_words(tokenizer, changed))) < share / 2:
            way = {"lower": "give --lower-case", "upper": "write the lists in upper case"}
            if lower_case and case == "upper":
                way["upper"] = "leave --lower-case out, or write the lists in upper case"
            hint = f"in {case} case it would be {other:.0%}: {way[case]}"
            break
    raise DataError(
        f"{share:.0%} of the words in these lists are outside the model's vocabulary of {len(tokenizer):,} "
        f"(most often {examples}); {hint}"
    )


def _share(texts: Iterable[str], unknown: frozenset[str]) -> float:
    num_words = num_unknown = 0
    for text in texts:
        words = text.split()
        num_words += len(words)
        num_unknown += sum(word in unknown for word in words)
    return num_unknown / num_words if num_words else 0.0


def _cased(text: str, lower_case: bool) -> str:
    return text.lower() if lower_case else text


def _cache_file(
    model: SpeechModel, lists: Sequence[NBest], texts: Sequence[str], scoring: str, cache: str | Path | None
) -> Path | None:
    if cache is None or model.fingerprint is None:
        return None
    sizes = " ".join(str(len(entry.hypotheses)) for entry in lists)
    key = hash_text("\n".join([str(_CACHE_VERSION), model.fingerprint, scoring, sizes, *texts]))
    return Path(cache) / f"lm-scores-{key[:32]}.npz"


def _read_cache(path: Path, num_hypotheses: int) -> LmFeatures | None:
    """Kept scores; None if there are none, or the file is damaged (it is then written anew)."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            scores, unknown, tokens = (kept[name] for name in ("neural_lm_score", "num_unknown", "num_tokens"))
            num_nodes, seconds, num_windows = int(kept["num_nodes"]), float(kept["seconds"]), int(kept["num_windows"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if {scores.shape, unknown.shape, tokens.shape} != {(num_hypotheses,)} or not np.all(np.isfinite(scores)):
        return None
    return LmFeatures(scores, unknown, tokens, num_nodes, seconds, num_windows)


def _write_cache(path: Path, features: LmFeatures) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez(
            temporary,
            neural_lm_score=features.neural_lm_score,
            num_unknown=features.num_unknown,
            num_tokens=features.num_tokens,
            num_nodes=features.num_nodes,
            seconds=features.seconds,
            num_windows=features.num_windows,
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
