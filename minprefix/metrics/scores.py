"""BLEU, NIST, ROUGE-L and CIDEr, equal to the E2E challenge's scorer (tuetschek/e2e-metrics); METEOR by its Java
program, TER by the package sacrebleu, ROUGE of summaries by the package rouge-score.

BLEU and NIST use mteval-13a tokens. ROUGE-L, CIDEr and METEOR use the tokens of COCO's caption evaluation: lower-cased
Penn Treebank tokens from Stanford's PTBTokenizer 3.4.1 (read as UTF-8), without most punctuation.

The ROUGE-L of `summary_score` differs from that of `score`: other tokens, stems, and a plain F1.
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
from minprefix.system.errors import InputError, print_once

NGram = tuple[str, ...]
References = list[list[str]]  # for each hypothesis a list of at least one reference


def score(hypotheses: list[str], references: References) -> dict[str, float]:
    """The scores of a corpus by name: BLEU, NIST, ROUGE-L, CIDEr, METEOR and TER.

    If METEOR or TER cannot be computed, it is left out and the reason is printed to stderr. hypotheses: N strings;
    references: N lists of at least one string each; else InputError.
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
    """{n-gram: matches}: an n-gram of a text counts at most as often as in the reference that has it most often."""
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
            totals[n - 1] += len(tokens) - n + 1  # negative for a short text, as in the official scorer
        reference_length += min((abs(len(r) - len(tokens)), len(r)) for r in group)[1]
    # The lower bounds are the official scorer's: without a match at some order BLEU is nearly 0, and no error occurs.
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

    def information(ngram: NGram) -> float:  # in bits, of the last word given the others
        return math.log2(reference_counts[ngram[:-1]] / reference_counts[ngram])

    # Orders without n-grams count 0; the official scorer divides by zero there.
    total = sum(
        sum(k * information(ngram) for ngram, k in matches[n].items()) / totals[n] for n in range(5) if totals[n] != 0
    )
    ratio = min(1.0, totals[0] / mean_reference_length)
    return total * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)


def rouge_l(hypotheses: list[str], references: References, beta: float = 1.2) -> float:
    """Mean ROUGE-L F in 0..1 (Lin 2004; as in COCO, with the best precision and best recall over the references)."""
    check(hypotheses, references)
    total = 0.0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        tokens = ptb_tokens(hypothesis) or ("",)  # in COCO, split(" ") makes one empty word of an empty text
        group = [ptb_tokens(reference) or ("",) for reference in group]
        common = [common_subsequence_length(tokens, reference) for reference in group]
        precision = max(common) / len(tokens)
        recall = max(c / len(reference) for c, reference in zip(common, group, strict=True))
        if precision > 0:
            total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return total / len(hypotheses)


def common_subsequence_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit per token of `a` (Hyyrö 2004)."""
    positions: dict[str, int] = {}
    for i, token in enumerate(a):
        positions[token] = positions.get(token, 0) | 1 << i
    ones = row = (1 << len(a)) - 1
    for token in b:
        match = row & positions.get(token, 0)
        row = (row + match | row - match) & ones
    return len(a) - row.bit_count()


def cider(hypotheses: list[str], references: References, sigma: float = 6.0) -> float:
    """Mean CIDEr in 0..10 (Vedantam et al. 2015; as in COCO, with clipped counts and a Gaussian length penalty).

    An n-gram's document frequency is the number of inputs that have it in a reference; a corpus of one input scores 0.
    """
    check(hypotheses, references)

    def counts(text: str) -> list[Counter[NGram]]:  # for n = 1..4
        tokens = " ".join(ptb_tokens(text)).split()  # also splits tokens with a non-breaking space, as COCO does
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
        counters = counts(hypothesis)
        weights = [weigh(counter) for counter in counters]
        for reference in group:
            difference = counters[1].total() - reference[1].total()  # COCO uses the number of bigrams as the length
            penalty = math.exp(-(difference**2) / (2 * sigma**2))
            for (v, v_norm), (u, u_norm) in zip(weights, map(weigh, reference), strict=True):
                if v_norm > 0 and u_norm > 0:
                    dot = sum(min(v[ngram], u[ngram]) * u[ngram] for ngram in v.keys() & u.keys())
                    total += 10 * penalty * dot / (v_norm * u_norm) / 4 / len(group)
    return total / len(hypotheses)


def meteor(hypotheses: list[str], references: References) -> float:
    """Corpus METEOR 1.5 in 0..1 (Denkowski & Lavie 2014), by the Java program in the package pycocoevalcap.

    InputError if the package or Java is missing or fails. It takes seconds to start, and about 2 GB of memory.
    """
    check(hypotheses, references)
    try:
        from pycocoevalcap.meteor import meteor as package
    except ImportError as error:
        raise InputError("METEOR needs pycocoevalcap: pip install -e '.[eval]'") from error
    if shutil.which("java") is None:
        raise InputError("METEOR needs Java: install a Java runtime (e.g. openjdk) and put `java` on the PATH")
    folder = os.path.dirname(package.__file__)
    # The program shall write decimal points and read UTF-8, whatever the user's locale.
    command = ["java", "-Xmx2G", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8",
               "-jar", package.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]  # fmt: skip
    with tempfile.TemporaryFile() as errors:
        try:
            program = subprocess.Popen(command, cwd=folder, stdin=PIPE, stdout=PIPE, stderr=errors, encoding="utf-8")
            try:
                return ask_meteor(program, hypotheses, references)
            finally:
                program.kill()  # it would wait for more texts
                program.communicate()
        except (OSError, ValueError) as error:  # it died, for example from a text of thousands of words
            errors.seek(0)
            reason = errors.read().decode(errors="replace").strip().rpartition("\n")[2] or str(error)
            remedy = "give it 2 GB of memory and texts of ordinary length"
            raise InputError(f"METEOR's Java program failed ({reason:.300}): {remedy}") from error


def ask_meteor(program: "subprocess.Popen[str]", hypotheses: list[str], references: References) -> float:
    """The score of a corpus from a running METEOR: ask for the statistics of each text, then evaluate them together."""
    assert program.stdin and program.stdout
    statistics = ["EVAL"]
    for hypothesis, group in zip(hypotheses, references, strict=True):
        texts = [" ".join(ptb_tokens(text)).replace("|||", "") for text in (*group, hypothesis)]
        print("SCORE", *texts, sep=" ||| ", file=program.stdin, flush=True)
        statistics.append(program.stdout.readline().strip())
    print(*statistics, sep=" ||| ", file=program.stdin, flush=True)
    return [float(program.stdout.readline()) for _ in range(len(hypotheses) + 1)][-1]  # each text's score, then all


def ter(hypotheses: list[str], references: References) -> float:
    """Corpus TER, 0 and up, lower is better (Snover et al. 2006), by the package sacrebleu; punctuation split, no case.

    The number of edits from each text to its closest reference, divided by the mean length of its references, both
    summed over the corpus. InputError if the package is missing.
    """
    check(hypotheses, references)
    try:
        from sacrebleu import TER
    except ImportError as error:
        raise InputError("TER needs sacrebleu: pip install -e '.[eval]'") from error
    streams = list(zip_longest(*references))  # all first references, all second ones, ...; None if there are fewer
    return TER(normalized=True).corpus_score(hypotheses, streams).score / 100


def summary_score(
    hypotheses: list[str], references: References
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """ROUGE of summaries: {"ROUGE-1": mean F1 in 0..1, "ROUGE-2", "ROUGE-L"} and {the same keys: (low, high)}.

    The second dict has 95% bootstrap intervals over the inputs. InputError if the package is missing.
    """
    values = rouge(hypotheses, references)
    # With equal seeds, all three measures use the same resamples of the inputs.
    intervals = {measure: bootstrap(v) for measure, v in values.items()}
    return {measure: float(np.mean(v)) for measure, v in values.items()}, intervals


def rouge(hypotheses: list[str], references: References) -> dict[str, list[float]]:
    """{"ROUGE-1": the F1 of each input, "ROUGE-2", "ROUGE-L"} (Lin 2004; Google's rouge-score with Porter stems).

    With several references, the best one counts for each measure. ROUGE-L takes a text as one sentence. Tokens are runs
    of a-z and 0-9 in the lower-cased text. A text without tokens scores 0; a warning on stderr counts such references.
    """
    check(hypotheses, references)
    texts = [reference for group in references for reference in group]
    if empty := sum(not re.search("[a-z0-9]", text.lower()) for text in texts):
        count = f"{empty:,} of {len(texts):,} references ({empty / len(texts):.0%})"
        remedy = "score texts in other scripts with BLEU, or romanise them first"
        print_once(f"{count} have no letter a-z and no digit, all that ROUGE sees: they score 0; {remedy}")
    names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
    scorer = rouge_scorer()(list(names.values()), use_stemmer=True)
    rows = [scorer.score_multi(group, hypothesis) for hypothesis, group in zip(hypotheses, references, strict=True)]
    return {measure: [float(row[name].fmeasure) for row in rows] for measure, name in names.items()}


def rouge_scorer() -> type:
    """The scorer class of the package rouge-score; InputError if the package is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError('ROUGE of summaries needs rouge-score: pip install -e ".[eval]"') from error
    return RougeScorer


def bootstrap(
    values: list[float] | np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """(low, high): the percentile bootstrap interval of the mean of `values` (Efron 1979), determined by the seed."""
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    # One resample at a time: all indices at once would take 90 MB for 11,334 inputs, and ten times as long.
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=1 << 15)  # BLEU and NIST, and repeated evaluations, use the same references
def mteval_tokens(text: str) -> tuple[str, ...]:
    """Lower-cased tokens as of mteval-v13a.pl; an empty text is one empty token, as in the official scorer."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # all ASCII punctuation except ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a point or comma stays only between digits
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return tuple(re.sub(r"\s+", " ", text).strip().lower().split(" "))
