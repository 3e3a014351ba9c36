"""Penn Treebank tokens as in COCO's caption evaluation, which uses Stanford's PTBTokenizer 3.4.1."""

import functools
import re

# The behaviour of Stanford's PTBTokenizer, written as (token, right context) rules. At each position the rule with the
# longest match is used, context included, and the first of several equal ones. Characters that no rule matches are
# dropped. The aim is equality with the scorer's tokeniser, not good English: `good,well-known` is one word, and `(`
# becomes `-lrb-`. The {0,300} are not in the original: without them a long text without spaces takes quadratic time.
SPACE = r"[ \t\xa0\u2000-\u200a\u3000\r\n\x0b\x0c\x85\u2028\u2029]"
NO_LETTERS = (
    r"²³¹¼-¾⁰⁴-⁾₀-₎\u2150-\u218b\u2460-\u2bff\u3021-\u3029\u3038-\u303a\u3192-\u3195\u3220-\u33ff"
    r"\U00010000-\U0010ffff"
)  # numerals, and all characters beyond U+FFFF, which the lexer does not know
ALPHA = rf"[^\W\d_{NO_LETTERS}]"
ALPHA_DIGIT = rf"[^\W_{NO_LETTERS}]"
MARKS = (
    r"\xad\u02c2-\u036f\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0615-\u061a"
    r"\u064b-\u065e\u0670\u06d6-\u06ed\u0900-\u0ecd"
)
LETTER = rf"(?:{ALPHA}|[{MARKS}]|&[aeiou](?:acute|grave|uml);)"
WORD = rf"{LETTER}(?:{LETTER}|\d)*(?:[.!?]{LETTER}(?:{LETTER}|\d)*)*"  # good.The is one word
APOSTROPHE = r"(?:['\x92’]|&apos;)"
ANY_APOSTROPHE = r"(?:['`\x91\x92‘’‛]|&apos;)"
CLITIC = rf"{APOSTROPHE}(?:[msd]|re|ve|ll)"
NOT = rf"n{ANY_APOSTROPHE}t"
HYPHENATED = r"[a-z0-9][a-z0-9.,\xad]{0,300}(?:-(?:[a-z](?:\.[a-z])+\.|[a-z0-9\xad]+))+"
PART = rf"(?:[dol]{ANY_APOSTROPHE}{ALPHA_DIGIT})?{ALPHA_DIGIT}+"  # d'Artagnan
COMPOUND = rf"{PART}(?:[-_\u058a\u2010\u2011]{PART})*"
INITIALISM = r"(?-i:[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+)"  # R&B but not r&b
SLASHED = r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"
XML_NAME = r"[a-z][a-z0-9_:.-]*"
XML_VALUE = r"""(?:'[^'\r\n]*'|"[^"\r\n]*")"""
XML_TAG = rf"<(?:[!?][a-z-][^>\r\n]*|{XML_NAME}(?: +{XML_NAME}(?: *= *{XML_VALUE})?)*(?: */)?|/{XML_NAME}) *>"
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
SENTENCE_START_WORDS = """
    About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Then There These They This We When While What Yet You
""".split()
SENTENCE_STARTS = "|".join(f"(?-i:{word[0]}){word[1:]}" for word in SENTENCE_START_WORDS)
QUOTE = r"[`‘’‚‛“”„‟‹›«»\x91-\x94]"
RULES = [
    ("can", "not"),
    ("gon|wan", "na"),
    ("got", "ta"),
    ("gim|lem", "me"),
    (rf"{APOSTROPHE}t", "is"),
    ("'t", "was"),
    (XML_TAG, ""),
    (WORD, CLITIC),
    (r"[a-z\xad]*[a-mo-z]\xad*", NOT),
    (WORD, ""),
    (rf"{APOSTROPHE}(?:n{APOSTROPHE}?|em|till?|cause|[2-9]0s)|(?:dunkin|somethin|ol|[ldj]){APOSTROPHE}", ""),
    (rf"(?-i:[A-HJ-XZn]){ANY_APOSTROPHE}{ALPHA}{{2,}}", ""),  # O'Malley
    (rf"{ALPHA}+[aeiouy]{ANY_APOSTROPHE}(?-i:[aeiouA-Z]){ALPHA}*", ""),  # Shi'ite
    (r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cap'n|c'est", ""),
    (rf"o{ANY_APOSTROPHE}o|diff{ANY_APOSTROPHE}rent", ""),
    (rf"y{APOSTROPHE}", ALPHA),
    (rf"https?://[^\s\"<>|(){{}}]+{URL_END}", ""),
    (
        rf"(?:www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-z]{{2,4}}|(?:(?-i:[^\s\"`'<>|!(){{}},-_$])+\.)+(?:com|net|org|edu))"
        rf"(?:/[^\s\"<>|()]+{URL_END})?",
        "",
    ),
    (r"(?:<|&lt;)?[a-z0-9][^\s\"<>|(){}]{0,300}@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+(?:>|&gt;)?", ""),
    (rf"@[a-z_][a-z_0-9]*|#{LETTER}+", ""),
    (CLITIC, "[^a-z]"),
    (NOT, "[^a-z]"),
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|[-+]?(?:\d*(?:[.:,\xad\u066b\u066c]\d+)+|\d+)", ""),
    (r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", ""),
    (r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4}", ""),  # 3 1/2 is one token
    (r"-(?:lrb|rrb|lcb|rcb|lsb|rsb)-|pro-|anti-|s(?:&amp;|&)(?:p-500|ls)", ""),
    (SLASHED, ""),
    (r"(?-i:[A-Z]*)\$|#", ""),
    ("[a-z]", rf"\.{SPACE}+(?:{SENTENCE_STARTS}){SPACE}"),  # an initial ends the sentence
    (r"(?:ca|figs?|prop|nos?|sect?s?|arts?|bldg|pp|op|approx)\.", rf"{SPACE}?\d"),
    (
        rf"(?:{'|'.join(ABBREVIATIONS)}|p?pt(?-i:[ey])s?|(?-i:A)(?:rk|z)|(?-i:I)ll|(?-i:M)ass|(?-i:O)re|(?-i:P)a"
        r"|(?-i:W)ash|(?:ed|ph)\.d)\.",
        "(?s:.{0,2})",
    ),
    (rf"(?:{'|'.join(TITLES)}|(?-i:M)iss|[a-z](?:\.[a-z])*)\.", ""),
    (rf"{APOSTROPHE}\d\d", SPACE),
    (
        rf"(?:{LETTER}|\d)+(?:\.(?:{LETTER}|\d)+)*\.(?:avi|bat|bmp|bz2|c|class|cgi|cpp|dll|docx?|exe|flv|gif|gz|h|html?"
        r"|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|pptx?|ps|py|sql|tar|txt|wav|wm[va]|x|xml|zip|3gp)",
        rf"{SPACE}|[.?!,]",
    ),
    (rf"(?:{HYPHENATED}|{WORD}|{COMPOUND}|{INITIALISM})\.", "[,;:、]"),
    (r"(?:\(\d{2,3}\)[ \xa0]?|(?:\+\+?)?(?:\d{2,4}[- \xa0])?\d{2,4}[- \xa0])\d{3,4}[- \xa0]?\d{3,5}", ""),  # telephone
    (r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", ""),
    (r"(?-i:[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])", "[^a-z0-9]"),  # smileys
    (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", ""),
    (r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|-+|[?!]+|@+|#+|_+|\*+|(?:\\\*){1,3}|<<|>>|c\+\+|[cf]#", ""),
    (HYPHENATED, ""),
    (COMPOUND, ""),
    (INITIALISM, ""),
    ("'", r"[a-z][^ \t\r\n\xa0]"),
    (CLITIC, ""),
    (NOT, ""),
    (rf"{QUOTE}{{1,2}}|''|{APOSTROPHE}", ""),
    (r"&(?:mdash|ndash|md|amp|lt|gt|quot|nbsp|ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);", ""),
    (
        r"[!-/:-@\[-`{-~\x80\x85\x96\x97¡-¬®-¿×÷\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603"
        r"\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f9\u0964\u0965\u0e3f\u0e4f\u1fbd"
        r"\u2013-\u2017\u2020-\u2023\u2026\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u20a0\u20a4"
        r"\u20ac\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
        r"\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]",
        "",
    ),  # symbols that stand alone
]
PTB_RULES = [re.compile(f"({token})(?:{context})", re.I) for token, context in RULES]
# For speed: most words are followed by a space, and of those only the contractions are split by the rules.
PLAIN_WORD = re.compile(r"(?!(?:cannot|gonna|wanna|gotta|gimme|lemme)\b)([a-z]+)(?:,? |\n)", re.I | re.ASCII)
QUOTES_OR_CLITIC = re.compile(rf"{CLITIC}|{NOT}|(?:{QUOTE}|{APOSTROPHE}){{1,2}}", re.I)
STRAIGHT = {
    **dict.fromkeys(map(ord, "\x91‘‛‹"), "`"),
    **dict.fromkeys(map(ord, "\x92’›"), "'"),
    **dict.fromkeys(map(ord, "\x93“«"), "``"),
    **dict.fromkeys(map(ord, "\x94”»"), "''"),
}
SYMBOLS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "¢": "cents",
    **dict.fromkeys("\x80¤\u20a0€", "$"),
    "¼": "1/4",
    "½": "1/2",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}
# The punctuation that COCO removes, as it is before Stanford rewrites it (`–` as `--`, quotation marks as `` and '').
REMOVED = re.compile(r"[. \xa0]+|[\x85…]|-{1,4}|[\x96\x97–—―]|[?!,:;\"]|''?|``?|&(?:mdash|ndash|md|quot|nbsp);", re.I)


@functools.lru_cache(maxsize=1 << 15)
def ptb_tokens(text: str) -> tuple[str, ...]:
    """Lower-cased Penn Treebank tokens of a text, as from Stanford's PTBTokenizer, without COCO's punctuation."""
    text, tokens, position = text + "\n", [], 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        match = PLAIN_WORD.match(text, position)
        if match is None:
            matches = [match for rule in PTB_RULES if (match := rule.match(text, position))]
            match = max(matches, key=lambda match: match.end(), default=None)
        if match is None:  # the tokeniser drops this character
            position += 1
            continue
        position, token = match.end(1), match[1].lower()
        if QUOTES_OR_CLITIC.fullmatch(token):
            token = token.replace("&apos;", "'").translate(STRAIGHT)
        if not REMOVED.fullmatch(token):
            token = SYMBOLS.get(token) or token.replace("\xad", "").replace("&amp;", "&")
            token = token.replace(" ", "\xa0").replace("(", "-lrb-").replace(")", "-rrb-")
            tokens.append(token)
    return tuple(token for token in tokens if token)
