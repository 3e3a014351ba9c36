"""metrics.summary_score: ROUGE of summaries through the package rouge-score, and its bootstrap intervals."""

import importlib.util
import random
import statistics
import sys
import time
from collections import Counter

import numpy as np
import pytest

from minprefix import metrics
from minprefix.metrics import scores
from minprefix.system.errors import InputError, print_once

needs_rouge_score = pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None,
    reason='ROUGE of summaries is computed by the optional package rouge-score: pip install -e ".[eval]"',
)
MEASURES = ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
HYPOTHESES = [
    "Police arrested two men after the robbery in Leeds.",
    "The minister has resigned, the BBC reports.",
    "It rained.",
    "Shares fell 3.5% on Monday; oil prices were falling too.",
]
REFERENCES = [
    ["Two men were arrested by police after a robbery in Leeds.", "In Leeds, the police are arresting robbers."],
    ["A minister resigned on Monday.", "The BBC reported that the minister resigned.", "The minister has gone."],
    ["Heavy rain is expected."],
    ["Oil prices and shares fell by 3.5% on Monday."],
]


@needs_rouge_score
def test_known_values_by_hand():
    cases = [  # hypothesis, references, F1 of unigrams, bigrams and the longest common subsequence
        # 3 of 4 and of 6 unigrams, the bigram "the cat" of 3 and of 5, "the cat mat"
        ("the cat mat dog", ["the cat sat on the mat"], 2 * 3 / 10, 2 * 1 / 8, 2 * 3 / 10),
        # the same words in another order: a subsequence of one or of two
        ("b a", ["a b"], 1, 0, 1 / 2),
        # a repeated word counts as often as it is in both
        ("the the the the", ["the the cat"], 2 * 2 / 7, 2 * 1 / 5, 2 * 2 / 7),
        # stems (of words of four letters and more), case, punctuation
        ("Dogs were RUNNING!", ["the dog runs, were running"], 2 * 3 / 8, 2 * 1 / 6, 2 * 3 / 8),
        # the best reference of each measure: the first for unigrams, the second for bigrams and subsequences
        ("a b c d", ["d c b a", "a b c x"], 1, 2 / 3, 3 / 4),
    ]
    values = metrics.rouge([case[0] for case in cases], [case[1] for case in cases])
    assert list(values) == MEASURES
    for i, measure in enumerate(MEASURES):
        assert values[measure] == pytest.approx([case[2 + i] for case in cases], abs=1e-12)
    scores, intervals = metrics.summary_score([case[0] for case in cases], [case[1] for case in cases])
    assert list(scores) == list(intervals) == MEASURES
    for i, measure in enumerate(MEASURES):
        assert scores[measure] == pytest.approx(sum(case[2 + i] for case in cases) / len(cases), abs=1e-12)
        assert intervals[measure] == metrics.bootstrap(values[measure])
        assert intervals[measure][0] < scores[measure] < intervals[measure][1]


@needs_rouge_score
def test_equals_rouge_score_and_the_definition():
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenize = DefaultTokenizer(use_stemmer=True).tokenize

    def definition(measure, hypothesis, reference):
        h, r = tokenize(hypothesis), tokenize(reference)
        if measure == "ROUGE-L":
            common, total = metrics.common_subsequence_length(h, r), len(h) + len(r)
        else:
            h, r = (Counter(scores.ngrams(tokens, int(measure[-1]))) for tokens in (h, r))
            common, total = (h & r).total(), h.total() + r.total()
        return 2 * common / total if total else 0

    rng = random.Random(0)
    words = " ".join(HYPOTHESES + sum(REFERENCES, [])).split() + ["café", "\n", "--", "3,000", "U.S."]
    texts = [" ".join(rng.choices(words, k=rng.randrange(25))) for _ in range(120)]
    groups = [rng.sample(texts, rng.randrange(1, 4)) for _ in texts]
    values = metrics.rouge(texts, groups)
    for measure in MEASURES:
        scorer = RougeScorer(["rouge" + measure[-1]], use_stemmer=True)
        theirs = [
            max(next(iter(scorer.score(reference, text).values())).fmeasure for reference in group)
            for text, group in zip(texts, groups, strict=True)
        ]
        assert values[measure] == theirs
        assert values[measure] == pytest.approx(
            [
                max(definition(measure, text, reference) for reference in group)
                for text, group in zip(texts, groups, strict=True)
            ],
            abs=1e-12,
        )
        assert 0 < statistics.mean(theirs) < 1


@needs_rouge_score
def test_order_and_case_do_not_matter():
    scores, intervals = metrics.summary_score(HYPOTHESES, REFERENCES)
    assert all(0 < value < 1 for value in scores.values())
    assert metrics.summary_score(HYPOTHESES, [group[::-1] for group in REFERENCES]) == (scores, intervals)
    assert metrics.summary_score([text.upper() for text in HYPOTHESES], REFERENCES) == (scores, intervals)
    assert metrics.summary_score(HYPOTHESES[::-1], REFERENCES[::-1])[0] == pytest.approx(scores)


@needs_rouge_score
def test_empty_and_foreign_texts_score_0():
    texts = ["", " \n", "?! ... “—”", "你好 мир", "\ud800"]
    for a, b in ((texts, ["a cat"] * 5), (["a cat"] * 5, texts), (texts, texts)):
        assert metrics.rouge(a, [[text] for text in b]) == {measure: [0.0] * 5 for measure in MEASURES}
        scores, intervals = metrics.summary_score(a, [[text] for text in b])
        assert set(scores.values()) == {0.0} and set(intervals.values()) == {(0.0, 0.0)}
    # an empty reference beside a real one does no harm; other letters only cut words: "caf" is left of "café"
    assert metrics.rouge(["a cat"], [["", "a cat"]])["ROUGE-2"] == [1]
    assert metrics.rouge(["Café"], [["caf"]])["ROUGE-1"] == [1]


@pytest.mark.parametrize("function", [metrics.rouge, metrics.summary_score])
def test_says_what_is_missing(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)  # makes the import fail
    with pytest.raises(InputError, match=r'rouge-score: pip install -e "\.\[eval\]"'):
        function(HYPOTHESES, REFERENCES)


def test_bootstrap_equals_a_plain_loop():
    values, seed, resamples, level = [random.Random(1).random() ** 2 for _ in range(37)], 5, 200, 0.9
    rng, means = np.random.default_rng(seed), []
    for _ in range(resamples):
        means.append(sum(values[i] for i in rng.integers(len(values), size=len(values))) / len(values))
    means.sort()

    def percentile(p):  # linear between the two nearest of the sorted means
        below, part = divmod(p * (resamples - 1), 1)
        return means[int(below)] * (1 - part) + means[int(below) + 1] * part

    assert metrics.bootstrap(values, resamples, level, seed) == pytest.approx((percentile(0.05), percentile(0.95)))


def test_bootstrap_equals_theory():
    # five of ten are 1: the mean is a Binomial(10, 1/2) / 10, P(<= 0.1) = 0.011 and P(<= 0.2) = 0.055
    assert metrics.bootstrap([0, 1] * 5) == pytest.approx((0.2, 0.8))
    # many inputs: normal, with the standard error of the mean
    values = [(i / 2000) ** 2 for i in range(2000)]
    mean, error = statistics.mean(values), statistics.pstdev(values) / len(values) ** 0.5
    for level in 0.8, 0.95:
        z = statistics.NormalDist().inv_cdf((1 + level) / 2)
        interval = metrics.bootstrap(values, resamples=10000, level=level)
        assert interval == pytest.approx((mean - z * error, mean + z * error), abs=0.1 * error)


def test_bootstrap_properties():
    values = np.random.default_rng(3).random(50)
    low, high = metrics.bootstrap(values)
    assert (low, high) == metrics.bootstrap(list(values)) and type(low) is type(high) is float
    assert (low, high) != metrics.bootstrap(values, seed=1)
    assert min(values) < low < values.mean() < high < max(values)
    # the same resamples of the inputs whatever the values: these are exact relations
    assert metrics.bootstrap(3 * values + 1) == pytest.approx((3 * low + 1, 3 * high + 1))
    assert metrics.bootstrap(-values) == pytest.approx((-high, -low))
    better = metrics.bootstrap(values + np.random.default_rng(4).random(50))
    assert better[0] > low and better[1] > high
    # a lower level gives an interval inside
    intervals = [metrics.bootstrap(values, level=level) for level in (0.5, 0.8, 0.95, 0.99, 1)]
    lows, highs = zip(*intervals, strict=True)
    assert list(lows) == sorted(lows, reverse=True) and list(highs) == sorted(highs)
    # another order of the inputs gives other resamples of the same distribution
    assert metrics.bootstrap(np.sort(values)) == pytest.approx((low, high), abs=0.2 * (high - low))
    for n in 1, 7:  # no spread, no width
        assert metrics.bootstrap([0.3] * n) == (np.mean([0.3] * n),) * 2


def test_bootstrap_leaves_numpys_random_numbers_alone():
    before = np.random.get_state()[1:3]
    metrics.bootstrap([0.0, 1.0])
    after = np.random.get_state()[1:3]
    assert (before[0] == after[0]).all() and before[1] == after[1]


def test_bootstrap_is_fast():
    values = np.random.default_rng(0).random(11334)  # as many as XSum's test inputs; takes 0.05 s
    start = time.process_time()
    metrics.bootstrap(values)
    assert time.process_time() - start < 1


@needs_rouge_score
def test_texts_that_rouge_cannot_see_are_told_once(capsys):
    """google's own scorer gives these a perfect copy's score of 0."""
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["\u5929\u6c14\u5f88\u597d", "\u041f\u043e\u0433\u043e\u0434\u0430", "The weather in 2020", "..."]
    references = [[text] for text in texts]
    print_once.cache_clear()
    assert [metrics.rouge(texts, references)["ROUGE-1"] for _ in range(2)] == [[0, 0, 1, 0]] * 2
    expected = RougeScorer(["rouge1"], use_stemmer=True)
    assert [expected.score(text, text)["rouge1"].fmeasure for text in texts] == [0, 0, 1, 0]
    line = capsys.readouterr().err
    assert line.startswith("3 of 4 references (75%) have no letter a-z and no digit") and line.count("\n") == 1
    assert "BLEU" in line
    metrics.rouge(["The weather"], [["It rained."]])
    assert capsys.readouterr().err == ""
