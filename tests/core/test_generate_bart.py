"""BART's decoding and the constraints on it: against transformers' generate, a naive search, all possible sequences.

No model here is trained; random weights are scaled so that outputs vary, repeat themselves and end early, late or
never, which the tests check before they rely on it.
"""

import copy
from collections import Counter

import pytest
import torch

from minprefix.cli.search import recipe
from minprefix.core.bart import BART
from minprefix.core.cache import Cache
from minprefix.core.generate import generate, generate_ids, search_ids
from minprefix.core.prefix_kv import KVPrefix, tensors_of
from minprefix.formats.names import to_huggingface
from minprefix.formats.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_alphabet
from minprefix.system.errors import InputError

V, L, H, D, ROOM = 30, 2, 2, 16, 64
FIRST, PAD, END = 0, 1, 2
NEW = 16  # tokens
XSUM = {"beams": 6, "length_penalty": 0.8, "no_repeat_ngram": 3, "min_new_tokens": 4}  # in proportion
FORCED = {"forced_first": FIRST, "forced_last": END}
PREFIXES = ("none", "shared", "rows", "mixed")


def make_model(vocab_size=V, seed=3, **config):
    """Weights far larger than a fresh model's, words that weigh less, and an end token that wants to be written."""
    config = {"vocab_size": vocab_size, "max_position_embeddings": ROOM, "d_model": H * D, **config}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_layers": L, f"{side}_attention_heads": H, f"{side}_ffn_dim": 64}
    generator = torch.Generator().manual_seed(seed)
    model = BART(config).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "layernorm_embedding.weight" in name:
            p.fill_(0.5)
        elif p.dim() > 1 or name.endswith("bias"):
            std = 0.1 if p.dim() == 1 else 0.5 if "embed_positions" in name else 0.3 if "shared" in name else 0.6
            p.copy_(torch.randn(p.shape, generator=generator) * std)
    model.shared.weight[END] *= 1.5
    model.final_logits_bias[0, END] = 1.0
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def sources():
    """Ragged, one of them of an empty text."""
    generator = torch.Generator().manual_seed(2)
    lengths = [0, *torch.randint(1, 14, (39,), generator=generator).tolist()]
    return [[FIRST, *torch.randint(3, V, (n,), generator=generator).tolist(), END] for n in lengths]


def make_prefix(kind, n):
    """All three sites, each of its own length. mixed: per row at one site, for all at the others, a position offset."""
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(4)
    rows = {"shared": [(), (), ()], "rows": [(n,)] * 3, "mixed": [(n,), (1,), ()]}[kind]
    prefix = {
        site: torch.randn(L, 2, *row, H, P, D, generator=generator)
        for site, row, P in zip(("encoder", "decoder", "cross"), rows, (2, 3, 4), strict=True)
    }
    return KVPrefix(prefix, 1) if kind == "mixed" else prefix


def prefix_of(prefix, chosen):
    """A prefix for these sources only."""
    if prefix is None:
        return None
    part = {
        site: kv[:, :, chosen] if kv.dim() == 6 and kv.size(2) > 1 else kv for site, kv in tensors_of(prefix).items()
    }
    return KVPrefix(part, prefix.position_offset) if isinstance(prefix, KVPrefix) else part


def repeats(ids, n):
    """Whether a sequence has an n-gram twice."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) < len(ngrams)


# ---- the models do what the tests need ----


def test_outputs_vary_and_the_constraints_bite(model, sources):
    """The other tests are worth little unless this holds."""
    free = generate_ids(model, sources, END, END, None, beams=6, max_new_tokens=NEW, forced_first=FIRST)
    lengths = Counter(map(len, free))
    assert min(lengths[1], sum(lengths[n] for n in range(2, NEW)), lengths[NEW]) >= 5, lengths
    assert len(set(map(tuple, free))) > 20
    assert sum(repeats(target, 3) for target in free) > 20
    for change, least in (
        ({"no_repeat_ngram": 3}, 20), ({"no_repeat_ngram": 2}, 20), ({"min_new_tokens": 6}, 5), ({"beams": 1}, 5),
        ({"forced_first": None}, 20), ({"forced_last": END}, 20), ({"length_penalty": -1.0}, 5),
    ):  # fmt: skip
        options = {"beams": 6, "forced_first": FIRST} | change
        targets = generate_ids(model, sources, END, END, None, max_new_tokens=NEW, **options)
        assert sum(a != b for a, b in zip(targets, free, strict=True)) >= least, change
    strict = generate_ids(model, sources, END, END, None, max_new_tokens=NEW, **XSUM, **FORCED)
    lengths = Counter(map(len, strict))
    assert sum(lengths[n] for n in range(4, NEW - 1)) >= 5 and lengths[NEW - 1] >= 5, lengths
    assert len(set(map(tuple, strict))) > 20


# ---- transformers ----


def huggingface_generate(
    model, sources, together=False, length_names=("min_new_tokens", "max_new_tokens"), extra=None, **ours
):
    """transformers' generate under our options, row by row or in one padded batch -> token ids before the end.

    extra: its options to return sequences_scores, which are given back instead.
    """
    reason = "compares with transformers (pip install minprefix[parity])"
    transformers = pytest.importorskip("transformers", reason=reason)
    options = {"beams": 1, "length_penalty": 1.0, "no_repeat_ngram": 0, "min_new_tokens": 0, "max_new_tokens": NEW}
    options |= {"forced_first": None, "forced_last": None} | ours
    theirs = transformers.BartForConditionalGeneration(transformers.BartConfig(**model.config)).eval()
    theirs = theirs.to(next(model.parameters()).dtype)
    missing, unexpected = theirs.load_state_dict(to_huggingface(model), strict=False)
    assert not unexpected and all("embed_tokens" in name or name == "lm_head.weight" for name in missing)
    theirs.tie_weights()
    start = 1 if "max_length" in length_names else 0  # these lengths count the decoder's start token
    limits = (options["min_new_tokens"] + start, options["max_new_tokens"] + start)
    theirs.generation_config = transformers.GenerationConfig(
        num_beams=options["beams"], early_stopping=False, do_sample=False, length_penalty=options["length_penalty"],
        no_repeat_ngram_size=options["no_repeat_ngram"], forced_bos_token_id=options["forced_first"],
        forced_eos_token_id=options["forced_last"], decoder_start_token_id=END, bos_token_id=FIRST, pad_token_id=PAD,
        eos_token_id=END, bad_words_ids=[[i] for i in options.get("forbidden", ())] or None,
        **dict(zip(length_names, limits, strict=True)),
    )  # fmt: skip
    targets = []
    for batch in [sources] if together else [[source] for source in sources]:
        S = max(map(len, batch))
        ids = torch.tensor([source + [PAD] * (S - len(source)) for source in batch])
        mask = torch.tensor([[1] * len(source) + [0] * (S - len(source)) for source in batch])
        if extra:
            return theirs.generate(ids, attention_mask=mask, **extra).sequences_scores
        for row in theirs.generate(ids, attention_mask=mask).tolist():
            assert row[0] == END
            targets.append([*row[1:], END][: [*row[1:], END].index(END)])
    return targets


@pytest.mark.parametrize(
    "options",
    [
        {**XSUM, **FORCED},
        {**XSUM, **FORCED, "length_penalty": 2.0, "length_names": ("min_length", "max_length")},
        {**FORCED, "beams": 6, "length_penalty": 1.0, "no_repeat_ngram": 2, "forbidden": [5, 6, 7, 8]},
        {"beams": 6, "length_penalty": 0.0, "no_repeat_ngram": 2, "min_new_tokens": 8},
        {"beams": 6, "length_penalty": -1.0, "no_repeat_ngram": 3, "forced_first": FIRST},
        {"beams": 6, "length_penalty": 2.0, "forced_last": END},
        {**XSUM, "beams": 4, "min_new_tokens": NEW, "length_names": ("min_length", "max_length")},
        {**XSUM, **FORCED, "beams": 2, "min_new_tokens": NEW},
        {**FORCED, "no_repeat_ngram": 3, "min_new_tokens": 4},
        {"no_repeat_ngram": 2, "length_names": ("min_length", "max_length")},
        {"forced_last": END, "min_new_tokens": 6},
    ],
    ids=lambda options: " ".join(f"{key} {value}" for key, value in options.items() if key != "length_names"),
)
def test_the_search_is_transformers(model, sources, options):
    """24 sources in batches of 7 here, all at once there, and some of them row by row there."""
    sources = sources[:24]
    ours = {key: value for key, value in options.items() if key != "length_names"}
    targets = generate_ids(model, sources, END, END, None, max_new_tokens=NEW, batch_size=7, **{"beams": 1, **ours})
    assert huggingface_generate(model, sources, together=True, **options) == targets
    assert huggingface_generate(model, sources[:4], **options) == targets[:4]


def test_scores_are_transformers_under_all_constraints(model, sources):
    options = {**XSUM, **FORCED, "length_penalty": 0.8}
    model = copy.deepcopy(model).double()  # in float32 the two models' products differ by as much as 3e-5
    found = search_ids(model, sources[:12], END, END, None, **options, max_new_tokens=NEW, returned=options["beams"])
    scores = {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": options["beams"]}
    output = huggingface_generate(model, sources[:12], together=True, extra=scores, **options)
    assert [score for texts in found for _, score in texts] == pytest.approx(output.tolist(), abs=1e-5)


# ---- a naive search, by the definitions, in plain Python ----


def allowed(past, token, max_new_tokens, min_new_tokens=0, no_repeat_ngram=0, forced_first=None, forced_last=None,
            forbidden=()):  # fmt: skip
    """Whether a token may follow these generated ones."""
    if not past and forced_first is not None:
        return token == forced_first
    if len(past) + 1 == max_new_tokens and forced_last is not None:
        return token == forced_last
    early = token == END and len(past) < min_new_tokens
    repeated = no_repeat_ngram and repeats([*past, token], no_repeat_ngram)
    return not (early or repeated or token in forbidden)


def extend(score, past, log_probs, max_new_tokens, forced_first=None, forced_last=None, **constraints):
    """All (log-probability, tokens) that a token may make of one; a forced token costs nothing."""
    last = len(past) + 1 == max_new_tokens
    free = (forced_first is not None and not past) or (forced_last is not None and last)
    constraints |= {"forced_first": forced_first, "forced_last": forced_last}
    return [
        (score + (0.0 if free else log_prob), [*past, token])
        for token, log_prob in enumerate(log_probs)
        if allowed(past, token, max_new_tokens, **constraints)
    ]


def naive_beam_search(next_log_probs, beams, length_penalty, max_new_tokens, **constraints):
    """next_log_probs: list of the tokens generated so far, several times -> log-probabilities of the next for each."""
    running, finished = [(0.0, [])], []  # (log-probability, tokens), (score, tokens)
    for length in range(1, max_new_tokens + 1):
        log_probs = next_log_probs([new for _, new in running])
        candidates = [
            candidate
            for (score, new), row in zip(running, log_probs, strict=True)
            for candidate in extend(score, new, row, max_new_tokens, **constraints)
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        for score, new in candidates[:beams]:
            if new[-1] == END or length == max_new_tokens:
                finished.append((score / length**length_penalty, new))
        finished = sorted(finished, reverse=True)[:beams]
        running = [(score, new) for score, new in candidates if new[-1] != END][:beams]
        if not running or len(finished) == beams and running[0][0] / length**length_penalty <= finished[-1][0]:
            break
    return without_end(finished[0][1])


def naive_greedy(next_log_probs, max_new_tokens, **constraints):
    new = []
    while len(new) < max_new_tokens and new[-1:] != [END]:
        new = max(extend(0.0, new, next_log_probs([new])[0], max_new_tokens, **constraints))[1]
    return without_end(new)


def without_end(new):
    return new[:-1] if new[-1] == END else new


def recompute(model, source, prefix):
    """`next_log_probs` of BART: source and target anew at each step, no cache, no padding."""

    @torch.inference_mode()
    def next_log_probs(hypotheses):
        targets = torch.tensor([[END, *new] for new in hypotheses])
        logits = model(torch.tensor([source] * len(hypotheses)), targets, None, prefix)
        return logits[:, -1].log_softmax(-1).tolist()

    return next_log_probs


@pytest.mark.parametrize("kind", PREFIXES)
def test_the_search_is_the_naive_one(model, sources, kind):
    sources, new = sources[:8], 10
    prefix = make_prefix(kind, len(sources))
    for options in (
        {"beams": 3, "length_penalty": 0.8, "no_repeat_ngram": 2, "min_new_tokens": 4, **FORCED},
        {"beams": 3, "length_penalty": 2.0, "forced_last": END},
        {"beams": 1, "no_repeat_ngram": 2, "min_new_tokens": 4, **FORCED},
    ):
        ours = generate_ids(model, sources, END, END, prefix, max_new_tokens=new, batch_size=5, **options)
        search = naive_beam_search if options["beams"] > 1 else naive_greedy
        options = {key: value for key, value in options.items() if options["beams"] > 1 or key != "beams"}
        naive = [
            search(recompute(model, source, prefix_of(prefix, i)), max_new_tokens=new, **options)
            for i, source in enumerate(sources)
        ]
        assert ours == naive
        if prefix is not None:
            plain = generate_ids(model, sources, END, END, None, max_new_tokens=new, **{"beams": 1, **options})
            assert sum(a != b for a, b in zip(ours, plain, strict=True)) > 4


@pytest.mark.parametrize("kind", ["none", "rows", "mixed"])
def test_results_depend_neither_on_the_batch_nor_on_the_order(model, sources, kind):
    sources = sources[:20]
    prefix = make_prefix(kind, len(sources))
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(5)).tolist()
    mixed = [sources[i] for i in order]
    for options in ({**XSUM, "beams": 3}, {"beams": 1, "no_repeat_ngram": 3}):
        options |= {"max_new_tokens": 10, **FORCED}
        expected = generate_ids(model, sources, END, END, prefix, batch_size=7, **options)
        for size in (1, 1000):
            assert generate_ids(model, sources, END, END, prefix, batch_size=size, **options) == expected
        targets = generate_ids(model, mixed, END, END, prefix_of(prefix, order), batch_size=7, **options)
        assert targets == [expected[i] for i in order]


# ---- tables: small enough for all sequences there are ----


class Table:
    """A model of 6 tokens, its logits looked up by position and last token, prone to repeat what it wrote."""

    V, NEW, encoder_decoder = 6, 5, False

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(self.NEW, self.V, self.V, generator=generator)
        self.table += 2 * torch.randn(self.V, self.V, generator=generator)  # at any position: cycles
        self.log_probs = self.table.log_softmax(-1).tolist()
        self.config = {"vocab_size": self.V}
        self.n_positions = self.NEW

    def parameters(self):
        return iter([self.table])

    def prefill(self, ids, lengths, prefix):
        return Cache([], torch.zeros(len(lengths), 1, 0), torch.zeros_like(lengths), [])

    def step(self, ids, cache):
        states = self.table[cache.position, ids]
        cache.position = cache.position + 1
        return states

    def logits(self, states):
        return states

    def next_log_probs(self, hypotheses):
        return [self.log_probs[len(new)][[END, *new][-1]] for new in hypotheses]

    def all_sequences(self, score=0.0, new=(), **constraints):
        """(log-probability, tokens) of each sequence that the constraints allow."""
        new = list(new)
        if new[-1:] == [END] or len(new) == self.NEW:
            return [(score, new)]
        longer = extend(score, new, self.next_log_probs([new])[0], self.NEW, **constraints)
        return [each for part in longer for each in self.all_sequences(*part, **constraints)]


@pytest.mark.parametrize(
    "constraints",
    [
        {},
        {"no_repeat_ngram": 1},
        {"no_repeat_ngram": 2},
        {"no_repeat_ngram": 2, "min_new_tokens": 3, "forced_first": 4},
        {"no_repeat_ngram": 3, "min_new_tokens": 5},
        {"min_new_tokens": 4, "forced_last": END},
        {"no_repeat_ngram": 1, "forced_first": FIRST, "forced_last": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("length_penalty", [-0.5, 0.8, 2.0])
def test_among_all_sequences(constraints, length_penalty):
    """What is found is what the naive search finds, is allowed, and is mostly the best of all that are."""
    seeds, best, differs = range(8), 0, 0
    for seed in seeds:
        table = Table(seed)
        every = {
            tuple(without_end(new)): score / len(new) ** length_penalty
            for score, new in table.all_sequences(**constraints)
        }
        plain = {"length_penalty": length_penalty, "max_new_tokens": Table.NEW}
        options = {**plain, **constraints}
        [found] = generate_ids(table, [[]], END, END, beams=3, **options)
        assert found == naive_beam_search(table.next_log_probs, 3, **options)
        best += every[tuple(found)] >= max(every.values()) - 1e-5
        [greedy] = generate_ids(table, [[]], END, END, beams=1, max_new_tokens=Table.NEW, **constraints)
        assert greedy == naive_greedy(table.next_log_probs, Table.NEW, **constraints) and tuple(greedy) in every
        [free] = generate_ids(table, [[]], END, END, beams=3, **plain)
        differs += free != found
    assert best > len(seeds) / 2
    assert differs or not constraints


# ---- what each constraint promises ----


@pytest.mark.parametrize(
    "options", [{"beams": 6}, {"beams": 1}, {"beams": 1, "sample": True, "temperature": 0.5}], ids=str
)
def test_promises(model, sources, options):
    sources = sources[:20]

    def run(**more):
        seed = {"generator": torch.Generator().manual_seed(0)} if "sample" in options else {}
        return generate_ids(model, sources, END, END, None, max_new_tokens=NEW, **{**options, **seed, **more})

    free = run()
    for n in (1, 2, 3, 4):
        assert sum(repeats(target, n) for target in free) > 5
        for more in ({}, FORCED) if n == 3 else ({},):
            targets = run(no_repeat_ngram=n, **more)
            assert not any(repeats(target, n) for target in targets)
            assert sum(map(len, targets)) > len(targets)
    assert min(map(len, free)) < 3
    for least in (3, NEW - 1, NEW):
        targets = run(min_new_tokens=least)
        assert min(map(len, targets)) >= least and END not in sum(targets, [])
    for forced in (FIRST, 9):
        assert {target[0] for target in run(forced_first=forced, min_new_tokens=1)} == {forced}
    assert run(forced_first=END) == [[]] * len(sources)
    assert any(len(target) == NEW for target in free)
    assert {len(target) for target in run(forced_last=END, min_new_tokens=NEW)} == {NEW - 1}
    targets = run(forced_last=9)
    assert {target[-1] for target in targets if len(target) == NEW} == {9}
    assert {len(target) for target in targets} > {NEW}  # only those that reach the last position have it


def test_recipes():
    summaries = {"beams": 6, "length_penalty": 0.8, "no_repeat_ngram": 3, "min_new_tokens": 10, "max_new_tokens": 60,
                 "one_line": True}  # fmt: skip
    tables = {"beams": 5, "length_penalty": 1.0, "no_repeat_ngram": 0, "min_new_tokens": 0, "max_new_tokens": 64,
              "one_line": True}  # fmt: skip
    assert recipe("xsum") == recipe("scitldr") == summaries
    assert recipe("e2e") == tables and recipe("my/train.jsonl") == {**tables, "one_line": False}
    recipe("xsum")["beams"] = 1
    assert recipe("xsum") == summaries


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens is 5: it must be from 0 to 4"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"length_penalty": 20.0}, "length_penalty is 20.0"),
        ({"beams": 16}, "beams is 16: it must be at most 15, 1/2 of the tokens that may be written"),
        ({"beams": 15, "forbidden": [3]}, "beams is 15: it must be at most 14"),
        ({"prefix": {"cross": torch.zeros(L, 2, 3, H, 1, D)}}, "has 3 rows for 2 sources"),
        ({"prefix": {"encoder": torch.zeros(L, 2, 3, H, 1, D)}}, "has 3 rows for 2 sources"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_senseless_options_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        generate_ids(model, [[0, 5, 2], [0, 2]], END, END, **options)


def test_what_just_fits(model):
    """The source has the encoder's 64 positions to itself; the decoder's hold a prefix of 3 and 61 new tokens."""
    prefix, long = make_prefix("shared", 0), [FIRST, *[9] * (ROOM - 2), END]
    options = {"beams": 2, "min_new_tokens": ROOM - 3}
    targets = generate_ids(model, [[0, 5, 2], long], END, END, prefix, max_new_tokens=ROOM - 3, **options)
    assert [len(target) for target in targets] == [ROOM - 3] * 2
    with pytest.raises(InputError, match="needs 65 positions .* the model has 64"):
        generate_ids(model, [[0, 5, 2], long], END, END, prefix, max_new_tokens=ROOM - 2, **options)
    with pytest.raises(InputError, match="source 2 of 2, the longest with 65 tokens: 65 tokens .*shorten the text"):
        generate_ids(model, [[0, 5, 2], [*long, END]], END, END, prefix, max_new_tokens=4, beams=2)


def test_a_source_without_a_token_is_refused(model):
    """Cross-attention would have nothing to look at; encode_sources gives an empty text <s> and </s>."""
    with pytest.raises(InputError, match="source 2 of 3 has no token"):
        generate_ids(model, [[0, 5, 2], [], [0, 2]], END, END, beams=2, max_new_tokens=4)


def test_bfloat16_and_no_sources(model, sources):
    half = make_model().to(torch.bfloat16)
    options = {**XSUM, **FORCED, "max_new_tokens": NEW}
    targets = generate_ids(half, sources, END, END, make_prefix("rows", len(sources)), **options)
    assert len(targets) == len(sources) and not any(repeats(target, 3) for target in targets)
    assert generate_ids(model, [], END, END) == []


# ---- text ----


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte, between the special tokens that BART has."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *byte_alphabet(), "<mask>"]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, [])


@pytest.fixture(scope="module")
def writer(tokenizer):
    """It writes letters, blanks, line breaks and special tokens."""
    model = make_model(tokenizer.vocab_size, forced_bos_token_id=FIRST)
    bias = model.final_logits_bias[0]
    bias[3:] = -20.0
    bias[tokenizer.encode("abcdefghijklmnopqrstuvwxyz \n")] = 0.0
    bias[tokenizer.encode(" \n")] = 3.0
    bias[[tokenizer.special[token] for token in ("<s>", "<pad>", "<unk>", "<mask>")]] = 3.0
    return model


TEXTS = ["a model of text", "", "x", "one  two", "</s> is text <s>", "é\n?", "z" * 30, "abc def", "q q q", "9"]


def test_texts_have_no_special_tokens(writer, tokenizer):
    sources = [[FIRST, *tokenizer.encode(text), END] for text in TEXTS]
    assert sources[1] == [FIRST, END]
    options = {"beams": 3, "max_new_tokens": NEW, "no_repeat_ngram": 3}
    special = set(tokenizer.special.values())
    for newlines in (False, True):
        forbidden = {"forbidden": () if newlines else tokenizer.encode("\n")}
        targets = generate_ids(writer, sources, END, END, None, **options, **FORCED, **forbidden)
        assert all(target[0] == FIRST for target in targets)
        assert len(special & {i for target in targets for i in target[1:]}) >= 2
        written = [tokenizer.decode(i for i in target if i not in special) for target in targets]
        assert newlines == any("\n" in text.strip() for text in written)
        assert any(text != text.strip() for text in written)
        texts = generate(writer, tokenizer, TEXTS, **options, **(forbidden if newlines else {}))
        assert texts == [text.strip() for text in written]
        assert not any(token in text for token in SPECIAL_TOKENS for text in texts)
        assert len(set(texts)) > 4


def test_first_and_last_token_are_those_of_the_config(writer, tokenizer, monkeypatch):
    sources = [[FIRST, *tokenizer.encode(text), END] for text in TEXTS]
    options = {"beams": 3, "max_new_tokens": 5, "min_new_tokens": 4}
    a, b = tokenizer.encode("ab")
    seen = set()
    for config, given, start, forced in (
        ({}, {}, END, (FIRST, END)),
        ({"forced_bos_token_id": a, "forced_eos_token_id": b}, {}, END, (a, b)),
        ({"forced_bos_token_id": None, "forced_eos_token_id": None}, {}, END, (None, None)),
        ({"decoder_start_token_id": a}, {}, a, (FIRST, END)),
        ({}, {"forced_first": None, "forced_last": b}, END, (None, b)),
    ):
        with monkeypatch.context() as patch:
            for key, value in config.items():
                patch.setitem(writer.config, key, value)
            texts = generate(writer, tokenizer, TEXTS, **options, **given)
        expected = generate_ids(
            writer, sources, start, END, forced_first=forced[0], forced_last=forced[1],
            forbidden=tokenizer.newline_ids, **options,
        )  # fmt: skip
        special = set(tokenizer.special.values())
        assert texts == [tokenizer.decode(i for i in target if i not in special).strip() for target in expected]
        seen.add(tuple(texts))
    assert len(seen) == 5


def test_long_sources_are_cut(writer, tokenizer):
    """At max_source tokens, <s> and </s> among them, by default at what the encoder has positions for."""
    options = {"beams": 2, "max_new_tokens": 8, "min_new_tokens": 4}
    texts = ["abcdefghijklmnop", "abc", "ponmlkjihgfedcba" * 100]
    for max_source, kept in ((8, 6), (3, 1), (None, ROOM - 2)):
        cut = generate(writer, tokenizer, texts, max_source=max_source, **options)
        assert cut == generate(writer, tokenizer, [text[:kept] for text in texts], **options)
    assert generate(writer, tokenizer, texts, max_source=8, **options) != cut
    with pytest.raises(InputError, match="at most 2 tokens have no room"):
        generate(writer, tokenizer, texts, max_source=2, **options)
    with pytest.raises(InputError, match="list of texts"):
        generate(writer, tokenizer, "one text", **options)
    assert generate(writer, tokenizer, []) == []
