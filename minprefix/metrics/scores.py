"""BLEU, NIST, ROUGE-L and CIDEr, equal to the E2E challenge's scorer (tuetschek/e2e-metrics); METEOR through Java, TER
through the package sacrebleu.

BLEU and NIST see mteval-13a tokens; ROUGE-L, CIDEr and METEOR see what COCO's caption evaluation sees: lower-cased
Penn Treebank tokens from Stanford's PTBTokenizer 3.4.1 (read as UTF-8), most punctuation removed.

For summaries, `summary_score` gives ROUGE-1, -2 and -L with intervals, through the package rouge-score: other tokens,
stems, and a plain F1, so its ROUGE-L is not the ROUGE-L of `score`.
"""

import functools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from subprocess import PIPE

import numpy as np

from minprefix.metrics.ptb import ptb_tokens
from minprefix.system.errors import InputError

NGram = tuple[str, ...]
References = list[list[str]]  # of each hypothesis, at least one


def score(hypotheses: list[str], references: References) -> dict[str, float]:
    """All scores of a corpus as a dict: BLEU, NIST, ROUGE-L, CIDEr, and METEOR and TER when what they need is there.

    Why one of these two is left out is told on stderr.
    hypotheses: N strings; references: N lists of at least one string each. Raises InputError where they are not.
    """
    scores = {
        "BLEU": bleu(hypotheses, references),
        "NIST": nist(hypotheses, references),
        "ROUGE-L": rouge_l(hypotheses, references),
        "CIDEr": cider(hypotheses, references),
    }
    for name, function in (("METEOR", meteor), ("TER", ter)):
        try:
            scores[name] = function(hypotheses, references)
        except InputError as error:
            print(f"left out: {error}", file=sys.stderr)
    return scores


def check(hypotheses: list[str], references: References) -> None:
    """Raise InputError unless there are N > 0 hypotheses and, for each, a list of at least one reference."""
    if len(hypotheses) != len(references):
        raise InputError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references: give one list each")
    if len(hypotheses) == 0:
        raise InputError("nothing to score: the corpus has no hypotheses")
    for i, group in enumerate(references):
        if isinstance(group, str) or len(group) == 0:
            raise InputError(f"references[{i}] must be a list of at least one string")


def ngrams(tokens: Sequence[str], n: int) -> Iterator[NGram]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def clipped_matches(tokens: Sequence[str], references: Sequence[Sequence[str]], n: int) -> dict[NGram, int]:
    """{n-gram: matches}: a hypothesis n-gram counts at most as often as in the reference that has most of it."""
    counts = Counter(ngrams(tokens, n))
    most = dict.fromkeys(counts, 0)
    for reference in references:
        for ngram, count in Counter(filter(counts.__contains__, ngrams(reference, n))).items():
            most[ngram] = max(most[ngram], count)
    return {ngram: min(count, most[ngram]) for ngram, count in counts.items() if most[ngram] > 0}


def bleu(hypotheses: list[str], references: References) -> float:
    """Corpus BLEU-4 in 0..1 (Papineni et al. 2002; mteval-13a tokens, no case, closest reference length)."""
    check(hypotheses, references)
    matches, totals, reference_length = [0] * 4, [0] * 4, 0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        tokens, group = mteval_tokens(hypothesis), [mteval_tokens(reference) for reference in group]
        for n in range(1, 5):
            matches[n - 1] += sum(clipped_matches(tokens, group, n).values())
            totals[n - 1] += len(tokens) - n + 1  # below zero for a short text: the official scorer's quirk
        reference_length += min((abs(len(r) - len(tokens)), len(r)) for r in group)[1]
    # The tiny floors are the official ones: no match at some order gives nearly 0, not an error.
    precisions = [max(m, 1e-15) / max(t, 1e-9) for m, t in zip(matches, totals, strict=True)]
    brevity_penalty = math.exp(min(0.0, 1 - reference_length / totals[0]))
    return brevity_penalty * math.exp(sum(math.log(p) for p in precisions) / 4)


def nist(hypotheses: list[str], references: References) -> float:
    """Corpus NIST-5, 0 and up (Doddington 2002; mteval-13a tokens, no case, mean reference length)."""
    check(hypotheses, references)
    reference_counts: Counter[NGram] = Counter()
    matches: list[Counter[NGram]] = [Counter() for _ in range(5)]
    totals, mean_reference_length = [0] * 5, 0.0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        tokens, group = mteval_tokens(hypothesis), [mteval_tokens(reference) for reference in group]
        for n in range(1, 6):
            matches[n - 1].update(clipped_matches(tokens, group, n))
            totals[n - 1] += len(tokens) - n + 1
            for reference in group:
                reference_counts.update(ngrams(reference, n))
        length = sum(len(reference) for reference in group)
        reference_counts[()] += length  # the empty prefix of every unigram
        mean_reference_length += length / len(group)

    def information(ngram: NGram) -> float:  # bits: how much the last word tells after the others
        return math.log2(reference_counts[ngram[:-1]] / reference_counts[ngram])

    # The official scorer divides by zero where an order's total is 0; there is nothing to score then, so 0.
    total = sum(
        sum(k * information(ngram) for ngram, k in matches[n].items()) / totals[n] for n in range(5) if totals[n] != 0
    )
    ratio = min(1.0, totals[0] / mean_reference_length)
    return total * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)


def rouge_l(hypotheses: list[str], references: References, beta: float = 1.2) -> float:
    """Mean ROUGE-L F in 0..1 (Lin 2004; as in COCO: best precision and best recall over an input's references)."""
    check(hypotheses, references)
    total = 0.0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        tokens = ptb_tokens(hypothesis) or ("",)  # COCO's split(" ") sees one empty word in an empty text
        group = [ptb_tokens(reference) or ("",) for reference in group]
        common = [common_subsequence_length(tokens, reference) for reference in group]
        precision = max(common) / len(tokens)
        recall = max(c / len(reference) for c, reference in zip(common, group, strict=True))
        if precision > 0:
            total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return total / len(hypotheses)


def common_subsequence_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit per token of `a` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    every = row = (1 << len(a)) - 1
    for token in b:
        match = row & places.get(token, 0)
        row = (row + match | row - match) & every
    return len(a) - row.bit_count()


def cider(hypotheses: list[str], references: References, sigma: float = 6.0) -> float:
    """Mean CIDEr, 0..10 (Vedantam et al. 2015; as in COCO: clipped counts and a Gaussian penalty on the length).

    An n-gram's document frequency is the number of inputs with it in some reference: a corpus of one scores 0.
    """
    check(hypotheses, references)

    def counts(text: str) -> list[Counter[NGram]]:  # n = 1..4; tokens with a non-breaking space fall apart, as in COCO
        tokens = " ".join(ptb_tokens(text)).split()
        return [Counter(ngrams(tokens, n)) for n in range(1, 5)]

    groups = [[counts(reference) for reference in group] for group in references]
    frequency: Counter[NGram] = Counter()
    for group in groups:
        frequency.update({ngram for reference in group for counter in reference for ngram in counter})
    idf = {ngram: math.log(len(groups) / f) for ngram, f in frequency.items()}
    unseen = math.log(len(groups))

    def weigh(counter: Counter[NGram]) -> tuple[dict[NGram, float], float]:  # n-gram -> tf-idf, its norm
        weights = {ngram: tf * idf.get(ngram, unseen) for ngram, tf in counter.items()}
        return weights, math.sqrt(sum(w * w for w in weights.values()))

    total = 0.0
    for hypothesis, group in zip(hypotheses, groups, strict=True):
        own = counts(hypothesis)
        own_weights = [weigh(counter) for counter in own]
        for reference in group:
            difference = own[1].total() - reference[1].total()  # COCO takes the number of bigrams for the length
            penalty = math.exp(-(difference**2) / (2 * sigma**2))
            for (v, v_norm), (u, u_norm) in zip(own_weights, map(weigh, reference), strict=True):
                if v_norm > 0 and u_norm > 0:
                    dot = sum(min(v[ngram], u[ngram]) * u[ngram] for ngram in v.keys() & u.keys())
                    total += 10 * penalty * dot / (v_norm * u_norm) / 4 / len(group)
    return total / len(hypotheses)


def meteor(hypotheses: list[str], references: References) -> float:
    """Corpus METEOR 1.5 in 0..1 (Denkowski & Lavie 2014), by its Java program from the package pycocoevalcap.

    Raises InputError if the package or Java is missing or fails. Takes seconds to start and about 2 GB of memory.
    """
    check(hypotheses, references)
    try:
        from pycocoevalcap.meteor import meteor as package
    except ImportError as error:
        raise InputError("METEOR needs pycocoevalcap: pip install -e '.[eval]'") from error
    if shutil.which("java") is None:
        raise InputError("METEOR needs Java: install a Java runtime (e.g. openjdk) and put `java` on the PATH")
    folder = os.path.dirname(package.__file__)
    # Whatever the user's locale: numbers have a point, texts are UTF-8.
    command = ["java", "-Xmx2G", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8",
               "-jar", package.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]  # fmt: skip
    with tempfile.TemporaryFile() as errors:
        try:
            program = subprocess.Popen(command, cwd=folder, stdin=PIPE, stdout=PIPE, stderr=errors, encoding="utf-8")
            try:
                return ask_meteor(program, hypotheses, references)
            finally:
                program.kill()  # it would wait for further texts
                program.communicate()
        except (OSError, ValueError) as error:  # it died: of too little memory, or of a text thousands of words long
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().rpartition("\n")[2] or str(error)
            remedy = "give it 2 GB of memory and texts of ordinary length"
            raise InputError(f"METEOR's Java program failed ({said:.300}): {remedy}") from error


def ask_meteor(program: "subprocess.Popen[str]", hypotheses: list[str], references: References) -> float:
    """The score of a corpus by a running METEOR: the statistics of each text, then what they come to."""
    assert program.stdin and program.stdout
    statistics = ["EVAL"]
    for hypothesis, group in zip(hypotheses, references, strict=True):
        texts = [" ".join(ptb_tokens(text)).replace("|||", "") for text in (*group, hypothesis)]
        print("SCORE", *texts, sep=" ||| ", file=program.stdin, flush=True)
        statistics.append(program.stdout.readline().strip())
    print(*statistics, sep=" ||| ", file=program.stdin, flush=True)
    return [float(program.stdout.readline()) for _ in range(len(hypotheses) + 1)][-1]  # each text's, then the corpus's


def ter(hypotheses: list[str], references: References) -> float:
    """Corpus TER, 0 and up, lower is better (Snover et al. 2006), by the package sacrebleu; punctuation apart, no case.

    The fewest edits that make a text one of its references, over the mean length of its references; summed over the
    corpus. Raises InputError if the package is missing.
    """
    check(hypotheses, references)
    try:
        from sacrebleu import TER
    except ImportError as error:
        raise InputError("TER needs sacrebleu: pip install -e '.[eval]'") from error
    # sacrebleu wants the first references of all texts, then the second, ...: None where a text has no more.
    streams = list(zip_longest(*references))
    return TER(normalized=True).corpus_score(hypotheses, streams).score / 100


def summary_score(
    hypotheses: list[str], references: References
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """ROUGE of summaries: {"ROUGE-1": mean F1 in 0..1, "ROUGE-2", "ROUGE-L"} and {the same keys: (low, high)}.

    The second dict has 95% bootstrap intervals over the inputs. Raises InputError if the package is missing.
    """
    values = rouge(hypotheses, references)
    # One seed for all three: each measure sees the same resamples of the inputs.
    intervals = {measure: bootstrap(v) for measure, v in values.items()}
    return {measure: float(np.mean(v)) for measure, v in values.items()}, intervals


def rouge(hypotheses: list[str], references: References) -> dict[str, list[float]]:
    """{"ROUGE-1": the F1 of each input, "ROUGE-2", "ROUGE-L"} (Lin 2004; google's rouge-score with Porter stems).

    With several references: the best of the references for each measure. A text is one sentence to ROUGE-L. A token
    is a run of a-z and 0-9 of the lower-cased text, all else only separates: a text without any scores 0, and the share
    of such references is said on stderr.
    """
    check(hypotheses, references)
    texts = [reference for group in references for reference in group]
    unseen = sum(not re.search("[a-z0-9]", text.lower()) for text in texts)
    if unseen:
        warn_of_unseen(f"{unseen:,} of {len(texts):,} references ({unseen / len(texts):.0%})")
    names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    scorer = rouge_scorer()(list(names.values()), use_stemmer=True)
    rows = [scorer.score_multi(group, hypothesis) for hypothesis, group in zip(hypotheses, references, strict=True)]
    return {measure: [float(row[name].fmeasure) for row in rows] for measure, name in names.items()}


@functools.cache  # once for the same references, which are scored against before and after training
def warn_of_unseen(share: str) -> None:
    """Say that texts have nothing that ROUGE sees, and what to do."""
    remedy = "score texts in other scripts with BLEU, or romanise them first"
    print(f"{share} have no letter a-z and no digit, all that ROUGE sees: they score 0; {remedy}", file=sys.stderr)


def rouge_scorer() -> type:
    """The scorer class of the package rouge-score; InputError if that is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError('ROUGE of summaries needs rouge-score: pip install -e ".[eval]"') from error
    return RougeScorer


def bootstrap(
    values: list[float] | np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """(low, high): the percentile bootstrap interval of the mean of `values` (Efron 1979), the same for equal seeds."""
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    # Row by row: all indices at once would take 90 MB for 11,334 inputs, and ten times as long.
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=1 << 15)  # BLEU and NIST, and one evaluation after another, see the same references
def mteval_tokens(text: str) -> tuple[str, ...]:
    """Lower-cased tokens of mteval-v13a; an empty text is one empty token, as in the official scorer."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # all ASCII punctuation but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a point or comma stays only between digits
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return tuple(re.sub(r"\s+", " ", text).strip().lower().split(" "))
