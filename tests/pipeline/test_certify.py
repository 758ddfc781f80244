"""Certificates: how often each verdict is said where the truth is known, models that are and are not lossless, refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2

from mixbits.asr.formats.jsonl import read_nbest, write_nbest
from mixbits.asr.significance import mapsswe
from mixbits.errors import DataError, FormatError, SpecError
from mixbits.lm.checkpoint import load_model, model_hash, save_model
from mixbits.pipeline.certified_models import card_hash
from mixbits.pipeline.certify import certify, changed_one_bests, compared_hash
from mixbits.pipeline.evaluate import evaluate_models
from mixbits.pipeline.evidence import DEFAULT_MARGIN_NATS, list_evidence, perplexity_evidence
from mixbits.pipeline.quantize import quantize_model
from mixbits.pipeline.rescore import rescore_systems
from mixbits.pipeline.settings import QuantizeSettings
from mixbits.pipeline.verdicts import Claim, Evidence, holm, judge, worst
from mixbits.report.certificate import certificate_page

_spec = importlib.util.spec_from_file_location("speech_example", Path(__file__).parent / "speech_example.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)

RUNS = 200
MOST = 17
"""Of 200 runs each wrong with probability 0.05, 17 or fewer are wrong with probability 0.99 (binomial)."""


def verdict_of(evidence, alpha=0.05):
    return judge({"part": evidence}, alpha=alpha)["part"].verdict


# ---- rules on numbers


def test_holm_is_the_textbook_procedure():
    p = [0.04, 0.01, 0.03, 0.5]
    assert holm(p) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = list(rng.random(5) ** 3)
        for alpha in (0.05, 0.3):
            rejected, order = set(), np.argsort(p)
            for step, index in enumerate(order):  # reject while p_(k) < alpha / (m - k + 1)
                if not p[index] < alpha / (5 - step):
                    break
                rejected.add(int(index))
            assert {i for i, value in enumerate(holm(p)) if value < alpha} == rejected
    assert holm([]) == []


def part(p_worse, *claims):
    return Evidence(p_worse, "finding", tuple(Claim(holds, f"claim {i}") for i, holds in enumerate(claims)), {})


def test_the_three_verdicts():
    assert verdict_of(part(0.04, True)) == "lossy"
    assert verdict_of(part(0.06, True, True)) == "lossless"
    assert verdict_of(part(0.06, True, False)) == "unresolved"
    assert verdict_of(part(None, True)) == "unresolved"
    judged = judge({"part": part(0.06, True, False)}, alpha=0.05)["part"]
    assert "claim 1" in judged.reason
    assert "claim 0" not in judged.reason
    assert worst(["lossless", "lossy", "unresolved"]) == "lossy"
    assert worst(["lossless", "unresolved"]) == "unresolved"
    assert worst(["lossless"]) == "lossless"


def test_more_lists_make_neither_lossless_nor_lossy_easier():
    two = judge({"a": part(0.04, True), "b": part(0.9, True)}, alpha=0.05)
    assert two["a"].verdict == "unresolved"
    assert two["a"].p_holm == pytest.approx(0.08)
    assert two["b"].verdict == "lossless"
    assert judge({"a": part(0.02, True), "b": part(None)}, alpha=0.05)["a"].verdict == "lossy"
    assert judge({"a": part(0.03, True), "b": part(None)}, alpha=0.05)["a"].verdict == "unresolved"


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0, math.nan, 5.0])
def test_levels_that_make_no_sense(alpha):
    with pytest.raises(SpecError, match=r"alpha is .* expected a significance level between 0 and 0.5"):
        judge({"a": part(0.5)}, alpha=alpha)


def test_perplexity_evidence_by_hand():
    # 3 sentences: t quantiles with 2 degrees of freedom have closed forms, t(1 - a) = (1 - 2a) / sqrt(2 a (1 - a))
    evidence = perplexity_evidence(0.002, 0.001, 3, alpha=0.05)
    one_sided = 0.9 / math.sqrt(2 * 0.05 * 0.95)
    two_sided = 0.95 / math.sqrt(2 * 0.025 * 0.975)
    assert evidence.figures["delta_nats_upper"] == pytest.approx(0.002 + 0.001 * one_sided)
    assert evidence.figures["delta_nats_interval"] == pytest.approx(
        [0.002 - 0.001 * two_sided, 0.002 + 0.001 * two_sided]
    )
    assert evidence.p_worse == pytest.approx(0.5 - 2 / (2 * math.sqrt(2 + 4)))  # F(t) = 1/2 + t / (2 sqrt(2 + t^2))
    assert evidence.figures["ppl_change_upper"] == pytest.approx(math.expm1(0.002 + 0.001 * one_sided))


@pytest.mark.parametrize(
    ("delta", "stderr", "sentences", "verdict"),
    [
        (0.0, 0.0, 100, "lossless"),  # the same model
        (1e-6, 0.0, 100, "lossy"),  # every sentence worse by the same amount
        (0.0, 0.001, 1000, "lossless"),
        (0.0, 0.01, 1000, "unresolved"),  # the margin cannot be excluded
        (0.005, 0.001, 1000, "lossy"),
        (-0.5, 0.3, 1000, "lossless"),
        (-0.5, 0.4, 1000, "unresolved"),  # not even with the estimate far on the good side
        (0.0, math.inf, 1, "unresolved"),
        (5000.0, 1.0, 1000, "lossy"),
    ],
)
def test_perplexity_verdicts(delta, stderr, sentences, verdict):
    assert verdict_of(perplexity_evidence(delta, stderr, sentences)) == verdict


@pytest.mark.parametrize("margin", [0.0, -0.01, math.nan, math.inf])
def test_margins_that_make_no_sense(margin):
    with pytest.raises(SpecError, match=r"margin is .* expected a positive number"):
        perplexity_evidence(0.0, 0.1, 10, margin_nats=margin)


# ---- how often each verdict is said where the truth is known


def simulated_perplexity(truth, seed, sentences=120):
    """A paired difference with true mean ``truth`` per token, estimated over sentences as perplexity does."""
    from mixbits.lm.corpus import TokenStream
    from mixbits.lm.perplexity import from_nll, paired_difference

    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 40, sentences)
    owner = np.repeat(np.arange(sentences, dtype=np.int32), lengths)
    common = np.repeat(rng.normal(0, 0.02, sentences), lengths)  # tokens of a sentence move together
    difference = truth + common + rng.laplace(0, 0.05, len(owner))
    base = rng.exponential(4.0, len(owner)).astype(np.float32)
    stream = TokenStream(np.zeros(len(owner) + 1, np.int32), owner, len(owner), 0, "")
    results = [from_nll(nll, stream, context=8, stride=4) for nll in ((base + difference).astype(np.float32), base)]
    return perplexity_evidence(*paired_difference(*results, stream), sentences)


def count(evidences):
    found = [verdict_of(evidence) for evidence in evidences]
    return {name: found.count(name) for name in ("lossless", "unresolved", "lossy")}


def test_perplexity_at_the_margin_is_rarely_called_lossless_and_no_loss_rarely_lossy():
    at_margin = count(simulated_perplexity(DEFAULT_MARGIN_NATS, seed) for seed in range(RUNS))
    assert at_margin["lossless"] <= MOST
    assert at_margin["lossy"] > RUNS / 2
    none = count(simulated_perplexity(0.0, seed) for seed in range(1000, 1000 + RUNS))
    assert none["lossy"] <= MOST
    assert none["lossless"] > 0.8 * RUNS
    # a wide bound that covers the truth 95 % of the time: not less often than 1 - alpha allows
    missed = sum(
        simulated_perplexity(0.003, seed).figures["delta_nats_upper"] < 0.003 for seed in range(2000, 2000 + RUNS)
    )
    assert missed <= MOST


def word_world(seed, *, gain, against, loss, repaired, utterances=40, slots=8):
    """Texts of first pass, full and packed with Poisson numbers of wrong words; ``gain`` and ``loss`` are the true net errors.

    Wrong words are three apart, so that each is a MAPSSWE segment of its own. Of the first pass ``gain + against`` are wrong that full has
    right, and ``against`` the other way round; packed has ``loss + repaired`` more wrong than full, and ``repaired`` fewer.
    """
    rng = np.random.default_rng(seed)
    counts = rng.poisson([gain + against, against, loss + repaired, repaired])
    groups = np.split(rng.permutation(utterances * slots)[: counts.sum()], np.cumsum(counts)[:-1])
    references = [[f"u{u}w{w}" for w in range(3 * slots)] for u in range(utterances)]
    texts = {}
    for system, wrong in {"first_pass": (0, 3), "full": (1, 3), "packed": (1, 2)}.items():
        lines = [list(line) for line in references]
        for place in np.concatenate([groups[kind] for kind in wrong]):
            lines[place // slots][3 * (place % slots)] = "x"
        texts[system] = [" ".join(line) for line in lines]
    return [" ".join(line) for line in references], texts


def simulated_list(seed, **truth):
    references, texts = word_world(seed, **truth)
    return list_evidence(references, first_pass_tuned=texts["first_pass"], **texts, num_draws=200, seed=seed)


@pytest.mark.parametrize(
    "truth",
    [
        {"gain": 12, "against": 3, "loss": 2.4, "repaired": 0},  # few changes: the bootstrap alone is too sure
        {"gain": 30, "against": 9, "loss": 6, "repaired": 4},
        {"gain": 60, "against": 30, "loss": 12, "repaired": 12},  # the gain itself is uncertain
    ],
)
def test_lists_at_the_margin_are_rarely_called_lossless(truth):
    found = count(simulated_list(seed, **truth) for seed in range(RUNS))
    assert found["lossless"] <= MOST


def test_lists_without_a_loss():
    found = count(simulated_list(seed, gain=90, against=20, loss=0, repaired=4) for seed in range(RUNS))
    assert found["lossy"] <= MOST
    assert found["lossless"] > 0.8 * RUNS
    found = count(simulated_list(seed, gain=90, against=20, loss=60, repaired=4) for seed in range(20))
    assert found["lossy"] == 20


# ---- the parts of a list's evidence


def texts_with(wrong, words=6, utterances=60):
    """(references, texts) with the given (utterance, word) places wrong."""
    lines = [[f"u{u}w{w}" for w in range(words)] for u in range(utterances)]
    references = [" ".join(line) for line in lines]
    for utterance, word in wrong:
        lines[utterance][word] = "x"
    return references, [" ".join(line) for line in lines]


def evidence_of(first, full, packed, **more):
    references = texts_with(())[0]
    first_pass, full, packed = (texts_with(wrong)[1] for wrong in (first, full, packed))
    return list_evidence(
        references, first_pass=first_pass, first_pass_tuned=first_pass, full=full, packed=packed, **more
    )


def test_an_unchanged_output_proves_no_more_than_its_size_can():
    few, many = [(u, 2) for u in range(10)] + [(u, 4) for u in range(3)], [(u, 2) for u in range(30)]
    same = evidence_of(few, [(u, 4) for u in range(4)], [(u, 4) for u in range(4)])
    z = 1.6448536269514722
    assert same.figures["delta_wer_upper_bootstrap"] == 0
    assert same.figures["delta_wer_upper"] == pytest.approx(100 * z * z / 360)  # 2.7 errors
    assert chi2.ppf(0.95, 2) / 2 == pytest.approx(z * z, rel=0.12)  # the exact Poisson bound: 3.0 errors
    assert verdict_of(same) == "unresolved"  # the gain is 9 errors, 1.8 are allowed
    assert same.p_worse == 1.0
    assert verdict_of(evidence_of(many, [(u, 2) for u in range(2)], [(u, 2) for u in range(2)])) == "lossless"


def test_nothing_to_lose_is_unresolved_and_better_is_lossless():
    wrong = [(u, 2) for u in range(20)]
    nothing = evidence_of(wrong, wrong, wrong)
    assert verdict_of(nothing) == "unresolved"
    assert "full precision does not significantly beat the first pass" in nothing.claims[0].text
    better = evidence_of(wrong, wrong, [*wrong[:1], (30, 2)])
    assert better.figures["significantly_better"] is True
    assert verdict_of(better) == "lossless"
    worse = evidence_of(wrong, wrong, [*wrong, *((u, 4) for u in range(30, 45)), (1, 5)][1:])
    assert verdict_of(worse) == "lossy"


def test_the_figures_are_those_of_mapsswe_and_of_the_counts():
    first, full, packed = [(u, 2) for u in range(30)], [(u, 2) for u in range(5)], [(u, 2) for u in range(4, 12)]
    evidence = evidence_of(first, full, packed)
    references = texts_with(())[0]
    test = mapsswe(references, texts_with(full)[1], texts_with(packed)[1])
    assert evidence.figures["mapsswe_p_value"] == test.p == evidence.p_worse
    assert evidence.figures["delta_wer"] == pytest.approx(100 * 3 / 360)
    assert evidence.figures["gain"] == pytest.approx(100 * 25 / 360)
    assert evidence.figures["allowed_loss"] == pytest.approx(100 * 5 / 360)
    turned = evidence_of(first, packed, full)
    assert turned.p_worse == 1.0


def test_equal_errors_everywhere_cannot_be_tested():
    evidence = evidence_of([(u, 2) for u in range(30)], [], [(u, 4) for u in range(3)])
    assert evidence.p_worse is None  # no spread between segments, and packed is worse
    assert verdict_of(evidence) == "unresolved"


def test_changed_one_bests():
    references = ["a b c", "a b c", "a b c", "a b c", ""]
    full, packed = ["a b c", "a b x", "a b x", "a b", "a"], ["a b c", "a b c", "a b y", "a", "a  "]
    expected = {"utterances": 5, "changed": 3, "better": 1, "worse": 1, "same_errors": 1}
    assert changed_one_bests(references, full, packed) == expected


# ---- models on disk


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The small speech world with a test text, and ``trained`` packed at 8 bits and at 1 bit without training."""
    folder = tmp_path_factory.mktemp("world")
    example.build_world(folder)
    lines = example.sentences(np.random.default_rng(9), 150)
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    for spec in ("8", "1"):
        quantize_model(
            folder / "trained", folder / f"packed-{spec}", settings=QuantizeSettings(), spec=spec, show_progress=False
        )
    return folder


def of(world, packed, **more):
    return certify(world / "trained", world / packed, text=world / "text.txt", **more)


def test_eight_bits_are_lossless_one_bit_is_not(world):
    lists = {"dev": world / "dev.jsonl", "lists": [world / "test.jsonl.gz"]}
    good, bad = of(world, "packed-8", **lists), of(world, "packed-1", **lists)
    assert (good["verdict"], bad["verdict"]) == ("lossless", "lossy")
    assert (good["perplexity"]["verdict"], bad["perplexity"]["verdict"]) == ("lossless", "lossy")
    assert good["warnings"] == []

    # the figures are those of evaluate and of rescore
    found = evaluate_models(world / "packed-8", world / "text.txt", reference=world / "trained")
    part = good["perplexity"]
    assert (part["delta_nats"], part["delta_nats_stderr"]) == (found["delta_nats"], found["delta_nats_stderr"])
    assert (part["packed"]["ppl"], part["full"]["ppl"]) == (found["ppl"], found["reference"]["ppl"])
    assert part["num_sentences"] == 150
    systems = {"full": world / "trained", "packed": world / "packed-8"}
    rescored = rescore_systems(systems, world / "dev.jsonl", {"test": world / "test.jsonl.gz"}, runtime="pytorch")
    entry = good["lists"]["test.jsonl.gz"]
    assert {name: s["wer"] for name, s in entry["systems"].items()} == {
        n: r["wer"] for n, r in rescored["rows"].items()
    }
    assert entry["delta_wer_upper"] == rescored["rows"]["packed"]["delta_wer_upper_95"]
    assert entry["mapsswe_p_value"] == rescored["rows"]["packed"]["p_value_vs_full"]
    assert good["weights"] == rescored["weights"]
    changed = entry["changed"]
    assert changed["changed"] == changed["better"] + changed["worse"] + changed["same_errors"]

    models = good["models"]
    size = (world / "packed-8" / "model.safetensors").stat().st_size
    assert models["packed"]["file_bytes"] == size
    assert models["packed"]["from_full"] is True
    assert models["full"]["sha256"] == model_hash(world / "trained") == models["packed"]["source_sha256"]
    assert models["compression_ratio"] == pytest.approx(4 * models["full"]["num_parameters"] / size)
    assert good["inputs"]["dev_sha256"] == read_nbest(world / "dev.jsonl").data_hash


def test_bit_identical_but_for_what_it_was_made_with(world, tmp_path):
    shutil.copytree(world / "packed-8", tmp_path / "elsewhere")
    lists = {"dev": world / "dev.jsonl", "lists": [world / "test.jsonl.gz"]}
    one, two = (
        of(world, "packed-8", **lists),
        certify(world / "trained", tmp_path / "elsewhere", text=world / "text.txt", **lists),
    )
    assert one["made_with"]["paths"] != two["made_with"]["paths"]
    for certificate in (one, two):
        del certificate["made_with"]
    assert json.dumps(one) == json.dumps(two)
    assert compared_hash(one) == one["compared_sha256"]
    other = of(world, "packed-8", seed=1, **lists)
    assert other["compared_sha256"] != one["compared_sha256"]
    assert other["lists"]["test.jsonl.gz"]["delta_wer_interval"] != one["lists"]["test.jsonl.gz"]["delta_wer_interval"]


def test_a_second_model_that_is_not_packed_or_came_from_elsewhere(world, tmp_path):
    same = of(world, "trained")
    assert same["models"]["packed"]["packed"] is False
    assert "not packed" in " ".join(same["warnings"])
    assert (same["verdict"], same["perplexity"]["delta_nats"]) == ("lossless", 0.0)
    elsewhere = certify(world / "untrained", world / "packed-8", text=world / "text.txt")
    assert "made from another model" in " ".join(elsewhere["warnings"])
    assert elsewhere["models"]["packed"]["from_full"] is False
    assert elsewhere["verdict"] == "lossless"  # far better than an untrained model
    shutil.copytree(world / "packed-8", tmp_path / "no-card")
    (tmp_path / "no-card" / "README.md").unlink()
    silent = certify(world / "trained", tmp_path / "no-card", text=world / "text.txt")
    assert "does not say which model" in " ".join(silent["warnings"])
    assert silent["models"]["packed"]["from_full"] is None


def test_few_sentences_and_the_training_text_are_said(world, tmp_path):
    (tmp_path / "few.txt").write_text("dogs chase mice\ncats watch fish\n")
    few = certify(world / "trained", world / "packed-8", text=tmp_path / "few.txt")
    assert "only 2 sentences" in " ".join(few["warnings"])
    (tmp_path / "one.txt").write_text("dogs chase mice\n")
    one = certify(world / "trained", world / "packed-8", text=tmp_path / "one.txt")
    assert one["verdict"] == "unresolved"
    assert one["perplexity"]["delta_nats_stderr"] is None
    assert "no test is possible" in one["reasons"][0]
    shutil.copytree(world / "packed-8", tmp_path / "p")
    lines_hash = few["inputs"]["text_lines_sha256"]
    card = (
        (tmp_path / "p" / "README.md")
        .read_text()
        .replace("| bits per weight", f"| training text sha256 | {lines_hash} |\n| bits per weight")
    )
    (tmp_path / "p" / "README.md").write_text(card)
    assert card_hash(tmp_path / "p", "training text sha256") == lines_hash
    seen = certify(world / "trained", tmp_path / "p", text=tmp_path / "few.txt")
    assert "trained on this very text" in " ".join(seen["warnings"])


def test_two_lists_of_one_name(world, tmp_path):
    lists = list(read_nbest(world / "test.jsonl.gz"))
    (tmp_path / "b").mkdir()
    for path, piece in ((tmp_path / "t.jsonl", lists[:100]), (tmp_path / "b" / "t.jsonl", lists[100:])):
        write_nbest(path, piece)
    found = of(world, "packed-8", dev=world / "dev.jsonl", lists=[tmp_path / "t.jsonl", tmp_path / "b" / "t.jsonl"])
    assert list(found["lists"]) == ["t.jsonl", "t.jsonl (2)"]
    assert [entry["utterances"] for entry in found["lists"].values()] == [100, 100]
    assert found["verdict"] == worst([found["perplexity"]["verdict"], *(e["verdict"] for e in found["lists"].values())])


def test_refusals(world, tmp_path):
    text, dev = world / "text.txt", world / "dev.jsonl"
    with pytest.raises(DataError, match="is quantized already; expected a full-precision"):
        certify(world / "packed-8", world / "packed-8", text=text)
    with pytest.raises(SpecError, match="got test lists without a dev list"):
        of(world, "packed-8", lists=[world / "test.jsonl.gz"])
    with pytest.raises(SpecError, match="got a dev list without test lists"):
        of(world, "packed-8", dev=dev)
    with pytest.raises(DataError, match="are among those the weights were tuned on"):
        of(world, "packed-8", dev=dev, lists=[dev])
    with pytest.raises(DataError, match="is the same list as one given before"):
        of(world, "packed-8", dev=dev, lists=[world / "test.jsonl.gz"] * 2)
    with pytest.raises(DataError, match="has no reference"):
        of(world, "packed-8", dev=dev, lists=[world / "blind.jsonl"])
    with pytest.raises(DataError, match=r"no config\.json"):
        of(world, "nothing")
    with pytest.raises(SpecError, match="margin is"):
        of(world, "packed-8", margin_nats=-1.0)
    with pytest.raises(SpecError, match="does not fit"):
        of(world, "packed-8", context=99)
    shutil.copytree(world / "packed-8", tmp_path / "cut")
    data = (world / "packed-8" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-8])
    with pytest.raises(FormatError):
        certify(world / "trained", tmp_path / "cut", text=text)


def test_other_vocabularies_and_other_tokens_are_refused(world, tmp_path, make_model):
    other = make_model(tmp_path / "other")
    with pytest.raises(DataError, match="different vocabularies"):
        certify(world / "trained", other, text=world / "text.txt")
    model, tokenizer = load_model(world / "trained")
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("dogs", "cats")
    save_model(model, tokenizer, tmp_path / "normal")
    with pytest.raises(DataError, match="into different tokens, though their vocabularies are the same"):
        certify(world / "trained", tmp_path / "normal", text=world / "text.txt")


def test_the_page_shows_verdict_and_figures_and_escapes(world):
    found = of(world, "packed-1", dev=world / "dev.jsonl", lists=[world / "test.jsonl.gz"])
    hostile = '<script>alert("x")</script>'
    found["warnings"].append(hostile)
    found["lists"][hostile] = found["lists"].pop("test.jsonl.gz")
    page = certificate_page(found)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert '<h1 class="lossy">lossy</h1>' in page
    assert found["compared_sha256"] in page
    assert f"{found['models']['packed']['file_bytes']:,} bytes" in page
    assert "src=" not in page
    assert "http" not in page.replace("http-equiv", "")
    unknown = of(world, "packed-8")
    unknown["perplexity"] |= {
        "delta_nats_stderr": None,
        "ppl_change_upper": None,
        "ppl_change_interval": [None, None],
        "p_worse": None,
    }
    assert "–" in certificate_page(unknown)


@pytest.mark.skipif("MIXBITS_DATA" not in os.environ, reason="MIXBITS_DATA is not set: no certificate on real lists")
def test_real_lists_with_a_tiny_model(tmp_path):
    """A model of a few seconds cannot beat a real recognizer: the lists must come out unresolved (or lossy), never lossless."""
    from mixbits.lm.presets import ModelSize, build_model
    from mixbits.lm.tokenizer import word_tokenizer

    data = Path(os.environ["MIXBITS_DATA"]) / "librispeech_10best"
    dev, test = (list(read_nbest(data / f"{name}.jsonl.gz"))[:80] for name in ("dev_clean", "test_clean"))
    write_nbest(tmp_path / "dev.jsonl", dev)
    write_nbest(tmp_path / "test.jsonl", test)
    lines = [entry.reference.lower() for entry in dev]
    (tmp_path / "text.txt").write_text("\n".join(lines[:40]) + "\n")
    tokenizer = word_tokenizer([h.text.lower() for entry in (*dev, *test) for h in entry.hypotheses], max_length=256)
    size = ModelSize(num_layers=1, hidden_size=16, feed_forward_size=32, num_heads=2, context=256)
    save_model(build_model(size, tokenizer, seed=0).eval(), tokenizer, tmp_path / "full")
    quantize_model(tmp_path / "full", tmp_path / "packed", settings=QuantizeSettings(), spec="8", show_progress=False)
    from mixbits.pipeline.rescore import ScoreSettings

    found = certify(
        tmp_path / "full", tmp_path / "packed", text=tmp_path / "text.txt", dev=tmp_path / "dev.jsonl", lists=[tmp_path / "test.jsonl"],
        settings=ScoreSettings(lower_case=True),
    )  # fmt: skip
    entry = found["lists"]["test.jsonl"]
    assert entry["utterances"] == 80
    assert entry["systems"]["first-pass"]["wer"] < 20
    assert entry["verdict"] != "lossless"
    assert found["verdict"] != "lossless"
