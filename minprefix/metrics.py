"""BLEU, NIST, ROUGE-L and CIDEr, equal to the E2E challenge's scorer (tuetschek/e2e-metrics); METEOR through Java.

BLEU and NIST see mteval-13a tokens; ROUGE-L, CIDEr and METEOR see what COCO's caption evaluation sees: lower-cased
Penn Treebank tokens from Stanford's PTBTokenizer 3.4.1 (read as UTF-8), most punctuation removed.
"""

import contextlib
import functools
import math
import re
import shutil
from collections import Counter

from minprefix.files import InputError


def score(hypotheses, references):
    """All scores of a corpus as a dict: BLEU, NIST, ROUGE-L, CIDEr, and METEOR when its extra and Java are there.

    hypotheses: N strings; references: N lists of at least one string each. Raises InputError where they are not.
    """
    scores = {
        "BLEU": bleu(hypotheses, references),
        "NIST": nist(hypotheses, references),
        "ROUGE-L": rouge_l(hypotheses, references),
        "CIDEr": cider(hypotheses, references),
    }
    with contextlib.suppress(InputError):
        scores["METEOR"] = meteor(hypotheses, references)
    return scores


def check(hypotheses, references):
    """Raise InputError unless there are N > 0 hypotheses and, for each, a list of at least one reference."""
    if len(hypotheses) != len(references):
        raise InputError(f"{len(hypotheses)} hypotheses but {len(references)} lists of references: give one list each")
    if len(hypotheses) == 0:
        raise InputError("nothing to score: the corpus has no hypotheses")
    for i, group in enumerate(references):
        if isinstance(group, str) or len(group) == 0:
            raise InputError(f"references[{i}] must be a list of at least one string")


def ngrams(tokens, n):
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def clipped_matches(tokens, references, n):
    """{n-gram: matches}: a hypothesis n-gram counts at most as often as in the reference that has most of it."""
    counts = Counter(ngrams(tokens, n))
    most = dict.fromkeys(counts, 0)
    for reference in references:
        for ngram, count in Counter(filter(counts.__contains__, ngrams(reference, n))).items():
            most[ngram] = max(most[ngram], count)
    return {ngram: min(count, most[ngram]) for ngram, count in counts.items() if most[ngram] > 0}


def bleu(hypotheses, references):
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


def nist(hypotheses, references):
    """Corpus NIST-5, 0 and up (Doddington 2002; mteval-13a tokens, no case, mean reference length)."""
    check(hypotheses, references)
    reference_counts, matches, totals = Counter(), [Counter() for _ in range(5)], [0] * 5
    mean_reference_length = 0.0
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

    def information(ngram):  # bits: how much the last word tells after the others
        return math.log2(reference_counts[ngram[:-1]] / reference_counts[ngram])

    # The official scorer divides by zero where an order's total is 0; there is nothing to score then, so 0.
    total = sum(sum(k * information(ngram) for ngram, k in matches[n].items()) / totals[n]
                for n in range(5) if totals[n] != 0)
    ratio = min(1.0, totals[0] / mean_reference_length)
    return total * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)


def rouge_l(hypotheses, references, beta=1.2):
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


def common_subsequence_length(a, b):
    """Length of the longest common subsequence, one bit per token of `a` (Hyyrö 2004)."""
    places = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    every = row = (1 << len(a)) - 1
    for token in b:
        match = row & places.get(token, 0)
        row = (row + match | row - match) & every
    return len(a) - row.bit_count()


def cider(hypotheses, references, sigma=6.0):
    """Mean CIDEr, 0..10 (Vedantam et al. 2015; as in COCO: clipped counts and a Gaussian penalty on the length).

    An n-gram's document frequency is the number of inputs with it in some reference: a corpus of one scores 0.
    """
    check(hypotheses, references)

    def counts(text):  # of all n-grams, n = 1..4; tokens with a non-breaking space fall apart, as in COCO
        tokens = " ".join(ptb_tokens(text)).split()
        return [Counter(ngrams(tokens, n)) for n in range(1, 5)]

    groups = [[counts(reference) for reference in group] for group in references]
    frequency = Counter()
    for group in groups:
        frequency.update(set().union(*(counter for reference in group for counter in reference)))
    log_size = math.log(len(groups))
    idf = {ngram: log_size - math.log(f) for ngram, f in frequency.items()}

    def weigh(counted):  # -> per n: {n-gram: tf-idf}, its norm; and the number of bigrams, COCO's length of a text
        vectors = [{ngram: tf * idf.get(ngram, log_size) for ngram, tf in counter.items()} for counter in counted]
        return vectors, [math.sqrt(sum(w * w for w in v.values())) for v in vectors], counted[1].total()

    total = 0.0
    for hypothesis, group in zip(hypotheses, groups, strict=True):
        vectors, norms, length = weigh(counts(hypothesis))
        for reference in group:
            others, other_norms, other_length = weigh(reference)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * sigma**2))
            for v, u, v_norm, u_norm in zip(vectors, others, norms, other_norms, strict=True):
                if v_norm > 0 and u_norm > 0:
                    dot = sum(min(w, u[ngram]) * u[ngram] for ngram, w in v.items() if ngram in u)
                    total += 10 * penalty * dot / (v_norm * u_norm) / 4 / len(group)
    return total / len(hypotheses)


def meteor(hypotheses, references):
    """Corpus METEOR 1.5 in 0..1 (Denkowski & Lavie 2014), by its Java program from the package pycocoevalcap.

    Raises InputError if the package or Java is missing. Takes seconds to start and about 2 GB of memory.
    """
    check(hypotheses, references)
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise InputError("METEOR needs pycocoevalcap: pip install 'minprefix[eval]'") from error
    if shutil.which("java") is None:
        raise InputError("METEOR needs Java: install a Java runtime (e.g. openjdk) and put `java` on the PATH")
    groups = {i: [" ".join(ptb_tokens(reference)) for reference in group] for i, group in enumerate(references)}
    return Meteor().compute_score(groups, {i: [" ".join(ptb_tokens(h))] for i, h in enumerate(hypotheses)})[0]


@functools.lru_cache(maxsize=1 << 15)  # BLEU and NIST, and one evaluation after another, see the same references
def mteval_tokens(text):
    """Lower-cased tokens of mteval-v13a; an empty text is one empty token, as in the official scorer."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # all ASCII punctuation but ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # a point or comma stays only between digits
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return tuple(re.sub(r"\s+", " ", text).strip().lower().split(" "))


# What Stanford's PTBTokenizer does, as (token, right context) rules of our own: at each place the longest match wins,
# context included, and the first rule among equals. A character that no rule takes is dropped. Nothing here aims to
# be sensible English: `good,well-known` is one word and `(` is `-lrb-` because the scorer's tokeniser says so.
SPACE = r"[ \t\xa0\u2000-\u200a\u3000]"
SPACE_OR_LINE_END = r"[ \t\xa0\u2000-\u200a\u3000\r\n\x0b\x0c\x85\u2028\u2029]"
NO_LETTERS = r"²³¹¼-¾⁰⁴-⁾₀-₎\u2150-\u218b\u2460-\u2bff\u3021-\u3029\u3038-\u303a\u3192-\u3195\u3220-\u33ff\U00010000-\U0010ffff"
ALPHA = rf"[^\W\d_{NO_LETTERS}]"
ALPHA_DIGIT = rf"[^\W_{NO_LETTERS}]"
MARKS = r"\xad\u02c2-\u036f\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ed\u0900-\u0ecd"
LETTER = rf"(?:{ALPHA}|[{MARKS}]|&[aeiou](?:acute|grave|uml);)"
WORD = rf"{LETTER}(?:{LETTER}|\d)*(?:[.!?]{LETTER}(?:{LETTER}|\d)*)*"  # good.The is one word
APOSTROPHE = r"(?:['\x92’]|&apos;)"
ANY_APOSTROPHE = r"(?:['`\x91\x92‘’‛]|&apos;)"
CLITIC = rf"{APOSTROPHE}(?:[msd]|re|ve|ll)"
NOT = rf"n{ANY_APOSTROPHE}t"
HYPHENATED = r"[a-z0-9][a-z0-9.,\xad]*(?:-(?:[a-z](?:\.[a-z])+\.|[a-z0-9\xad]+))+"
PART = rf"(?:[dol]{ANY_APOSTROPHE}{ALPHA_DIGIT})?{ALPHA_DIGIT}+"  # d'Artagnan
COMPOUND = rf"{PART}(?:[-_\u058a\u2010\u2011]{PART})*"
INITIALISM = r"(?-i:[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+)"  # R&B but not r&b
SLASHED = r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"
XML_NAME = r"[a-z][a-z0-9_:.-]*"
XML_TAG = rf"""<(?:[!?][a-z-][^>\r\n]*|{XML_NAME}(?: +{XML_NAME}(?: *= *(?:'[^'\r\n]*'|"[^"\r\n]*"))?)* */?|/{XML_NAME}) *>"""
URL_END = r"[^\s\"<>|.!?(){},-]"
ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn ct dak del fla ga ind kan kans ky la md mich minn mo mont neb nev okla penn tenn tex va vt
    wis wisc wyo inc co cos corp ltd plc bancorp dept bhd assn univ intl sys tel est ext sq ft jr sr bros blvd rd esq
    etc al seq bldg
""".split()
TITLES = """
    mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj sgt cpl pvt mt capt
    st ste ave pres lieut hon brig comdr cmdr pfc spc supt supts det ph mme mlle asst assoc insp msgr adj adv ens sfc rt
    vs alex wm jos cie cf treas invt elec natl mfg mtg
""".split()
SENTENCE_STARTS = """
    About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Then There These They This We When While What Yet You
""".split()
QUOTE = r"[`‘’‚‛“”„‟‹›«»\x91-\x94]"
PTB_RULES = [
    ("can", "not"), ("gon|wan", "na"), ("got", "ta"), ("gim|lem", "me"), (rf"{APOSTROPHE}t", "is"), ("'t", "was"),
    (XML_TAG, ""),
    (WORD, CLITIC), (r"[a-z\xad]*[a-mo-z]\xad*", NOT), (WORD, ""),
    (rf"{APOSTROPHE}(?:n{APOSTROPHE}?|em|till?|cause|[2-9]0s)|(?:dunkin|somethin|ol|[ldj]){APOSTROPHE}", ""),
    (rf"(?-i:[A-HJ-XZn]){ANY_APOSTROPHE}{ALPHA}{{2,}}", ""),  # O'Malley
    (rf"{ALPHA}+[aeiouy]{ANY_APOSTROPHE}(?-i:[aeiouA-Z]){ALPHA}*", ""),  # Shi'ite
    (r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cap'n|c'est", ""),
    (rf"o{ANY_APOSTROPHE}o|diff{ANY_APOSTROPHE}rent", ""), (rf"y{APOSTROPHE}", ALPHA),
    (rf"https?://[^\s\"<>|(){{}}]+{URL_END}", ""),
    (rf"(?:www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-z]{{2,4}}|(?:(?-i:[^\s\"`'<>|!(){{}},-_$])+\.)+(?:com|net|org|edu))"
     rf"(?:/[^\s\"<>|()]+{URL_END})?", ""),
    (r"(?:<|&lt;)?[a-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+(?:>|&gt;)?", ""),
    (rf"@[a-z_][a-z_0-9]*|#{LETTER}+", ""),
    (CLITIC, "[^a-z]"), (NOT, "[^a-z]"),
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|[-+]?(?:\d*(?:[.:,\xad\u066b\u066c]\d+)+|\d+)", ""),
    (r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", ""),
    (r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4}", ""),  # 3 1/2 is one token
    (r"-(?:lrb|rrb|lcb|rcb|lsb|rsb)-|pro-|anti-|s(?:&amp;|&)(?:p-500|ls)", ""), (SLASHED, ""),
    (r"(?-i:[A-Z]*)\$|#", ""),
    ("[a-z]", rf"\.{SPACE_OR_LINE_END}+(?:{'|'.join(f'(?-i:{w[0]}){w[1:]}' for w in SENTENCE_STARTS)}){SPACE_OR_LINE_END}"),
    (r"(?:ca|figs?|prop|nos?|sect?s?|arts?|bldg|pp|op|approx)\.", rf"{SPACE_OR_LINE_END}?\d"),
    (rf"(?:{'|'.join(ABBREVIATIONS)}|p?pt(?-i:[ey])s?|(?-i:A)(?:rk|z)|(?-i:I)ll|(?-i:M)ass|(?-i:O)re|(?-i:P)a|(?-i:W)ash"
     r"|(?:ed|ph)\.d)\.", "(?s:.{0,2})"),
    (rf"(?:{'|'.join(TITLES)}|(?-i:M)iss|[a-z](?:\.[a-z])*)\.", ""),
    (rf"{APOSTROPHE}\d\d", SPACE_OR_LINE_END),
    (rf"(?:{LETTER}|\d)+(?:\.(?:{LETTER}|\d)+)*\.(?:avi|bat|bmp|bz2|c|class|cgi|cpp|dll|docx?|exe|flv|gif|gz|h|html?|jar"
     r"|java|jpe?g|mov|mp3|pdf|php|pl|png|pptx?|ps|py|sql|tar|txt|wav|wm[va]|x|xml|zip|3gp)", rf"{SPACE_OR_LINE_END}|[.?!,]"),
    (rf"(?:{HYPHENATED}|{WORD}|{COMPOUND}|{INITIALISM})\.", "[,;:、]"),
    (r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])\d{3,4}[- \xa0]?\d{3,5}", ""),  # telephone
    (r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", ""),
    (r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])", "[^a-z0-9]"),  # smileys
    (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", ""),
    (r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|-+|[?!]+|@+|#+|_+|\*+|(?:\\\*){1,3}|<<|>>|c\+\+|[cf]#", ""),
    (HYPHENATED, ""), (COMPOUND, ""), (INITIALISM, ""), ("'", r"[a-z][^ \t\r\n\xa0]"), (CLITIC, ""), (NOT, ""), (rf"{QUOTE}{{1,2}}|''|{APOSTROPHE}", ""),
    (r"&(?:mdash|ndash|md|amp|lt|gt|quot|nbsp|ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);", ""),
    (r"[!-/:-@\[-`{-~\x80\x85\x96\x97¡-¬®-¿×÷\u2013-\u2015\u2016\u2017\u2020-\u2023\u2026\u2030-\u2038\u203b\u203e-\u2042"
     r"\u2044\u207a-\u207f\u208a-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb"
     r"\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]", ""),
]
PTB_RULES = [re.compile(f"({token})(?:{context})", re.IGNORECASE) for token, context in PTB_RULES]
# A shortcut past the rules: most words stand before a space, where nothing but the contractions splits them.
PLAIN_WORD = re.compile(r"(?!(?:cannot|gonna|wanna|gotta|gimme|lemme)\b)([a-z]+)(?:,? |\n)", re.IGNORECASE | re.ASCII)
QUOTES_OR_CLITIC = re.compile(rf"{CLITIC}|{NOT}|(?:{QUOTE}|{APOSTROPHE}){{1,2}}", re.IGNORECASE)
STRAIGHT = {**dict.fromkeys(map(ord, "\x91‘‛‹"), "`"), **dict.fromkeys(map(ord, "\x92’›"), "'"),
            **dict.fromkeys(map(ord, "\x93“«"), "``"), **dict.fromkeys(map(ord, "\x94”»"), "''")}
SYMBOLS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "¢": "cents",
           **dict.fromkeys("\x80¤\u20a0€", "$"), "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
           "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# The punctuation that COCO removes, before Stanford rewrites it: `–` would be `--`, a quotation mark `` or ''.
REMOVED = re.compile(r"[. \xa0]+|[\x85…]|-{1,4}|[\x96\x97–—―]|[?!,:;\"]|''?|``?|&(?:mdash|ndash|md|quot|nbsp);", re.IGNORECASE)


@functools.lru_cache(maxsize=1 << 15)
def ptb_tokens(text):
    """Lower-cased Penn Treebank tokens of a text without COCO's punctuation, as Stanford's PTBTokenizer makes them."""
    text, tokens, place = text + "\n", [], 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        match = PLAIN_WORD.match(text, place)
        if match is None:
            matches = [match for rule in PTB_RULES if (match := rule.match(text, place))]
            match = max(matches, key=lambda match: match.end(), default=None)
        if match is None:  # a character that the tokeniser throws away
            place += 1
            continue
        place, token = match.end(1), match[1].lower()
        if QUOTES_OR_CLITIC.fullmatch(token):
            token = token.replace("&apos;", "'").translate(STRAIGHT)
        if not REMOVED.fullmatch(token):
            token = SYMBOLS.get(token) or token.replace("\xad", "").replace("&amp;", "&")
            token = token.replace(" ", "\xa0").replace("(", "-lrb-").replace(")", "-rrb-")
            tokens.append(token)
    return tuple(token for token in tokens if token)
