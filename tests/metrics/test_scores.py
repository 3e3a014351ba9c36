"""minprefix.metrics against the E2E challenge's scorer.

golden/metrics.json holds texts written for this file with what tuetschek/e2e-metrics (pymteval.py for BLEU and NIST,
pycocoevalcap for ROUGE-L and CIDEr) and Stanford's PTBTokenizer 3.4.1 say of them; null where that scorer crashes.
"""

import json
import math
import random
import shutil
import sys
import time
from types import SimpleNamespace

import pytest

from minprefix.metrics import scores as metrics
from minprefix.metrics.ptb import ptb_tokens
from minprefix.system.errors import InputError
from tests.tiny import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "metrics.json").read_text(encoding="utf-8"))
SCORES = {"BLEU": metrics.bleu, "NIST": metrics.nist, "ROUGE-L": metrics.rouge_l, "CIDEr": metrics.cider}
HYPOTHESES = ["The Mill is a cheap pub near the river.", "Zizzi serves Thai food, and it's family friendly.", "No."]
REFERENCES = [
    ["The Mill is a low-priced pub by the river.", "Near the river is a cheap pub, The Mill."],
    ["Zizzi, a family-friendly place, serves Thai food.", "Zizzi has Thai food.", "Thai food for families: Zizzi."],
    ["Nothing is known."],
]


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("corpus", GOLDEN["corpora"], ids=lambda corpus: corpus["name"])
def test_equals_the_official_scorer(corpus, name):
    value = SCORES[name](corpus["hypotheses"], corpus["references"])
    if corpus["scores"][name] is None:  # the official scorer divides by zero
        assert value == 0
    else:
        assert value == pytest.approx(corpus["scores"][name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("text", "tokens"), GOLDEN["tokens"])
def test_tokens_equal_the_stanford_tokeniser(text, tokens):
    assert list(ptb_tokens(text)) == tokens


def test_mteval_tokens():
    text = "It's £20-25, &quot;1,000.5&quot; (U.S.)\nwell-\nknown, A/B <skipped>5. End…"
    assert metrics.mteval_tokens(text) == tuple(
        'it\'s £20 - 25 , " 1,000.5 " ( u . s . ) wellknown , a / b 5 . end…'.split()
    )
    assert metrics.mteval_tokens(" \t ") == ("",)


def test_a_perfect_match():
    hypotheses = ["The Mill is a cheap pub near the river.", "Zizzi serves Thai food and it is family friendly."]
    references = [["A worse one.", hypotheses[0]], [hypotheses[1]]]
    assert metrics.bleu(hypotheses, references) == pytest.approx(1, abs=1e-12)
    assert metrics.rouge_l(hypotheses, references) == pytest.approx(1, abs=1e-12)
    alone = [[text] for text in hypotheses]
    assert metrics.cider(hypotheses, alone) == pytest.approx(10, abs=1e-9)


def test_known_values_by_hand():
    # "a b c d e" against "a b c d f": matches 4/5, 3/4, 2/3, 1/2, equal lengths
    assert metrics.bleu(["a b c d e"], [["a b c d f"]]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # of references of 3 and 5 words, equally far from 4, the shorter one counts: no brevity penalty
    assert metrics.bleu(["a b c d"], [["a b c d e", "a b c"]]) == pytest.approx(1)
    # two unigrams of four equally frequent words carry log2(4) bits each; no bigram matches
    assert metrics.nist(["a x b y"], [["a q b z"]]) == pytest.approx((2 + 2) / 4)
    # LCS 2 of 3 and of 4 words
    p, r, beta2 = 2 / 3, 2 / 4, 1.44
    assert metrics.rouge_l(["a x b"], [["a y b z"]]) == pytest.approx((1 + beta2) * p * r / (r + beta2 * p))


@pytest.mark.parametrize("name", SCORES)
def test_order_and_case_do_not_matter(name):
    value = SCORES[name](HYPOTHESES, REFERENCES)
    assert value > 0
    assert SCORES[name](HYPOTHESES, [group[::-1] for group in REFERENCES]) == pytest.approx(value)
    assert SCORES[name](HYPOTHESES[::-1], REFERENCES[::-1]) == pytest.approx(value)
    assert SCORES[name]([text.upper() for text in HYPOTHESES], REFERENCES) == pytest.approx(value)
    worse = [text.replace("Thai", "Welsh").replace("river", "sea") for text in HYPOTHESES]
    assert SCORES[name](worse, REFERENCES) < value


def test_common_subsequence_length():
    def plain(a, b):  # the textbook table
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randrange(1, 90))] for _ in range(2))
        assert metrics.common_subsequence_length(a, b) == plain(a, b)


def test_any_text_is_scored():
    rng = random.Random(0)
    pool = [*"  .,;:!?'\"()[]{}<>&-–—…“”’£€$/%#@_*\\\t\n\r", *"aAé中😀١½ſ\u200b\xad\xa0\u2028 09", "n't", "U.S."]
    texts = ["".join(rng.choices(pool, k=rng.randrange(60))) for _ in range(300)]
    for function in SCORES.values():
        assert function(texts, [[a, b] for a, b in zip(texts[1:] + [""], texts[::-1], strict=True)]) >= 0


@pytest.mark.parametrize("text", ["a,b" * 10000, "x" * 100000, "?" * 100000, "<a " * 5000, ". " * 20000, "a@" * 5000])
def test_long_text_takes_no_quadratic_time(text):
    start = time.perf_counter()
    metrics.rouge_l([text], [[text]])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "function", [*SCORES.values(), metrics.meteor, metrics.ter, metrics.score, metrics.rouge, metrics.summary_score]
)
@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ([], [], "no hypotheses"),
        (["a"], [["a"], ["b"]], "1 hypotheses but 2"),
        (["a", "b"], [["a"], []], r"references\[1\]"),
        (["a"], ["a"], r"references\[0\]"),
    ],
)
def test_bad_input(function, hypotheses, references, message):
    with pytest.raises(InputError, match=message):
        function(hypotheses, references)


def test_meteor_and_ter_say_what_is_missing(monkeypatch):
    for function, module in ((metrics.meteor, "pycocoevalcap.meteor.meteor"), (metrics.ter, "sacrebleu")):
        monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
        with pytest.raises(InputError, match=r"pip install -e '\.\[eval\]'"):
            function(HYPOTHESES, REFERENCES)
    assert metrics.score(HYPOTHESES, REFERENCES) == {name: f(HYPOTHESES, REFERENCES) for name, f in SCORES.items()}


def test_meteor_needs_java(monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="METEOR is computed by the optional package pycocoevalcap")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="Java"):
        metrics.meteor(HYPOTHESES, REFERENCES)


@pytest.mark.parametrize(
    "java, said",
    [
        ("#!/bin/sh\necho Error occurred >&2\necho no memory >&2\nexit 1\n", "no memory"),
        ("not a program", "Exec format error"),
    ],
)
def test_why_meteor_is_left_out_is_told(java, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "java").write_text(java)
    (tmp_path / "java").chmod(0o755)
    (tmp_path / "meteor.py").write_text("METEOR_JAR = 'meteor-1.5.jar'\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    package = SimpleNamespace(METEOR_JAR="meteor-1.5.jar", __file__=str(tmp_path / "meteor.py"))
    monkeypatch.setitem(sys.modules, "pycocoevalcap", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pycocoevalcap.meteor", SimpleNamespace(meteor=package))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(InputError, match=said):
        metrics.meteor(HYPOTHESES * 2000, REFERENCES * 2000)  # more than a pipe holds
    assert metrics.score(HYPOTHESES, REFERENCES).keys() == SCORES.keys()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("left out: METEOR's Java program failed (") and said in first
    assert second == "left out: TER needs sacrebleu: pip install -e '.[eval]'"


@pytest.mark.parametrize("options", ["", "-Duser.language=de -Duser.country=DE"])
def test_meteor_equals_pycocoevalcaps_in_any_locale(options, monkeypatch):
    """In German numbers have a decimal comma, of which pycocoevalcap's class makes an error."""
    pytest.importorskip("pycocoevalcap", reason="METEOR is computed by the optional package pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    from pycocoevalcap.meteor.meteor import Meteor

    groups = {i: [" ".join(ptb_tokens(text)) for text in group] for i, group in enumerate(REFERENCES)}
    texts = {i: [" ".join(ptb_tokens(text))] for i, text in enumerate(HYPOTHESES)}
    expected = Meteor().compute_score(groups, texts)[0]
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", options)
    assert metrics.meteor(HYPOTHESES, REFERENCES) == expected > 0


def test_bleu_equals_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="a live comparison with the optional package sacrebleu")
    scorer = sacrebleu.BLEU(tokenize="13a", lowercase=True, smooth_method="none")
    # texts of four words and more: for a shorter one the official scorer counts less than no n-grams
    hypotheses, references = HYPOTHESES[:2] + ["It's £20-25, or 1,000.5 (U.S.) at A/B."], REFERENCES[:2]
    references = [*references, ["It costs £20-25 or 1,000.5 at A/B.", "It's £20 - 25, at A/B (U.S.)."]]
    streams = list(zip(*(group + group[-1:] * (3 - len(group)) for group in references), strict=True))
    for texts in hypotheses, [group[0] for group in references], [text[:-9] for text in hypotheses]:
        expected = scorer.corpus_score(texts, streams).score / 100
        assert 0 < expected
        assert metrics.bleu(texts, references) == pytest.approx(expected, abs=1e-9)


def test_ter_by_hand(monkeypatch):
    pytest.importorskip("sacrebleu", reason="TER is computed by the optional package sacrebleu")
    assert metrics.ter(["a b c d e"], [["a b c d e"]]) == 0
    assert metrics.ter(["d e a b c"], [["a b c d e"]]) == pytest.approx(1 / 5)  # one shift of a phrase
    assert metrics.ter(["a x c d"], [["a b c d e"]]) == pytest.approx(2 / 5)  # a substitution and an insertion
    # the fewest edits over the mean length, then summed over the corpus: 1 / 3.5 and 3 / 3
    assert metrics.ter(["a b c"], [["A b c d", "x y z"]]) == pytest.approx(1 / 3.5)
    assert metrics.ter(["a b c", "q"], [["a b c d", "x y z"], ["u v w"]]) == pytest.approx((1 + 3) / (3.5 + 3))
    assert metrics.ter(["Yes, a b."], [["yes , a b ."]]) == 0  # punctuation is words of its own
    assert metrics.ter(["a b"], [["a"]]) == 1 and metrics.ter([""], [["a b"]]) == 1
    monkeypatch.setattr(metrics, "meteor", metrics.bleu)  # Java takes its time
    assert metrics.score(HYPOTHESES, REFERENCES)["TER"] == metrics.ter(HYPOTHESES, REFERENCES)


def test_bleu_differs_from_sacrebleu_in_two_known_ways():
    """Short texts count less than no n-grams in the official scorer; sacrebleu takes no match at an order as 0."""
    sacrebleu = pytest.importorskip("sacrebleu", reason="a live comparison with the optional package sacrebleu")
    scorer = sacrebleu.BLEU(tokenize="13a", lowercase=True, smooth_method="none")
    assert 0 < metrics.bleu(["a b c x"], [["a b c d"]]) < 1e-3
    assert scorer.corpus_score(["a b c x"], [["a b c d"]]).score == 0
    hypotheses, reference = ["a b c d e x", "a"], ["a b c d e f", "a"]
    expected = math.prod((6 / 7, 4 / 5, 3 / (4 - 1), 2 / (3 - 2))) ** 0.25
    assert metrics.bleu(hypotheses, [[text] for text in reference]) == pytest.approx(expected)
    expected = math.prod((6 / 7, 4 / 5, 3 / 4, 2 / 3)) ** 0.25
    assert scorer.corpus_score(hypotheses, [reference]).score / 100 == pytest.approx(expected)
