"""Decoding against a naive oracle (one row at a time, no cache), against transformers, and against its own promises."""

import math
from collections import Counter

import pytest
import torch

from minprefix.core.cache import Cache
from minprefix.core.generate import CHECK_EVERY, generate, generate_ids, search_ids
from minprefix.core.gpt2 import GPT2
from minprefix.core.prefix_kv import KVInfix, KVPrefix
from minprefix.formats.names import to_huggingface
from minprefix.system.errors import InputError
from tests.helpers import reference_infix

V, END, P, L, H, D = 100, 7, 3, 2, 2, 16
CONFIG = {"vocab_size": V, "n_positions": 64, "n_embd": H * D, "n_layer": L, "n_head": H}
NEW = 12  # tokens
PREFIXES = ("none", "shared", "offset", "rows", "rows and offset")


@pytest.fixture(scope="module")
def model():
    """Random, but the end token is likely enough for early ends, late ends and none at all."""
    generator = torch.Generator().manual_seed(1)
    model = GPT2(CONFIG).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        elif name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.wte.weight[END] = model.wte.weight[END] * 0.5 + model.ln_f.bias * 8
    return model


@pytest.fixture(scope="module")
def sources():
    """Ragged, one of them empty."""
    generator = torch.Generator().manual_seed(2)
    lengths = [0, *torch.randint(1, 12, (51,), generator=generator).tolist()]
    return [torch.randint(8, V, (n,), generator=generator).tolist() for n in lengths]


def make_prefix(kind, n):
    generator = torch.Generator().manual_seed(3)
    if kind == "none":
        return None
    rows = (n,) if kind.startswith("rows") else ()
    tensor = torch.randn(L, 2, *rows, H, P, D, generator=generator)
    return KVPrefix({"decoder": tensor}, position_offset=0) if kind.endswith("offset") else {"decoder": tensor}


def prefix_row(prefix, i):
    """The prefix of source i alone, without a row dimension."""
    if prefix is None or prefix["decoder"].dim() == 5:
        return prefix
    row = {"decoder": prefix["decoder"][:, :, i]}
    return KVPrefix(row, prefix.position_offset) if isinstance(prefix, KVPrefix) else row


# ---------------------------------------------------------------------------------------------------------------------
# the oracle: the definitions, in plain Python


@torch.inference_mode()
def next_log_probs(model, ids, prefix, forbidden=()):
    log_probs = model(torch.tensor([ids]), prefix)[0, -1].log_softmax(-1)
    log_probs[list(forbidden)] = -math.inf
    return log_probs.tolist()


def naive_greedy(model, source, prefix):
    new = []
    while len(new) < NEW:
        log_probs = next_log_probs(model, [*source, END, *new], prefix)
        token = log_probs.index(max(log_probs))
        if token == END:
            break
        new.append(token)
    return new


def naive_beam_search(model, source, prefix, beams, length_penalty, forbidden=()):
    running, finished = [(0.0, [])], []  # (log-probability, tokens), (score, tokens)
    for length in range(1, NEW + 1):
        candidates = []
        for score, new in running:
            log_probs = next_log_probs(model, [*source, END, *new], prefix, forbidden)
            candidates += [(score + log_prob, [*new, token]) for token, log_prob in enumerate(log_probs)]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        for score, new in candidates[:beams]:
            if new[-1] == END or length == NEW:
                finished.append((score / length**length_penalty, new))
        finished = sorted(finished, reverse=True)[:beams]
        running = [(score, new) for score, new in candidates if new[-1] != END][:beams]
        if len(finished) == beams and running[0][0] / length**length_penalty <= finished[-1][0]:
            break
    best = finished[0][1]
    return best[:-1] if best[-1] == END else best


@pytest.mark.parametrize("kind", PREFIXES)
def test_greedy_is_the_naive_one(model, sources, kind):
    prefix = make_prefix(kind, len(sources))
    naive = [naive_greedy(model, source, prefix_row(prefix, i)) for i, source in enumerate(sources)]
    assert generate_ids(model, sources, END, END, prefix, beams=1, max_new_tokens=NEW, batch_size=7) == naive
    assert len({tuple(target) for target in naive}) > 20


@pytest.mark.parametrize("kind", PREFIXES)
def test_beam_search_is_the_naive_one(model, sources, kind):
    sources = sources[:12]
    prefix = make_prefix(kind, len(sources))
    for beams, length_penalty, forbidden in ((3, 1.0, ()), (2, 2.0, range(40, 60))):
        naive = [
            naive_beam_search(model, source, prefix_row(prefix, i), beams, length_penalty, forbidden)
            for i, source in enumerate(sources)
        ]
        options = {"length_penalty": length_penalty, "forbidden": forbidden, "batch_size": 5}
        ours = generate_ids(model, sources, END, END, prefix, beams=beams, max_new_tokens=NEW, **options)
        assert ours == naive


@pytest.mark.parametrize("every", [2, 5, 99])
@pytest.mark.parametrize("beams", [1, 3])
def test_finished_texts_may_stay_for_some_steps(model, sources, monkeypatch, every, beams):
    options = {"beams": beams, "max_new_tokens": NEW, "batch_size": 7, "no_repeat_ngram": 2}
    expected = search_ids(model, sources, END, END, make_prefix("shared", 0), **options)
    monkeypatch.setitem(CHECK_EVERY, "cpu", every)
    found = search_ids(model, sources, END, END, make_prefix("shared", 0), **options)
    assert [text for ((text, _),) in found] == [text for ((text, _),) in expected]
    torch.testing.assert_close(
        [score for ((_, score),) in found], [score for ((_, score),) in expected], rtol=1e-5, atol=1e-5
    )
    assert len({len(text) for ((text, _),) in expected}) > 3


@pytest.mark.parametrize("position_offset", [P, 0])
def test_beam_search_with_an_infix_is_the_naive_one(model, sources, position_offset):
    infix = KVInfix(make_prefix("shared", 0), position_offset)
    sources = sources[:16]
    behind = [infix.with_source_lengths(torch.tensor([len(source)])) for source in sources]
    for beams, length_penalty, forbidden in ((4, 0.0, range(40, 60)), (2, 2.0, ()), (3, 1.0, ())):
        naive = [naive_beam_search(model, source, at, beams, length_penalty, forbidden)
                 for source, at in zip(sources, behind, strict=True)]  # fmt: skip
        options = {"length_penalty": length_penalty, "forbidden": forbidden, "batch_size": 7}
        assert generate_ids(model, sources, END, END, infix, beams=beams, max_new_tokens=NEW, **options) == naive
    lengths = {len(target) for target in naive}
    assert min(lengths) < NEW == max(lengths)  # some texts end and leave their batch, others run on
    assert naive != generate_ids(model, sources, END, END, infix, beams=1, max_new_tokens=NEW)
    for other in (None, KVInfix(infix.kv, P - position_offset), make_prefix("shared", 0)):
        assert naive != generate_ids(model, sources, END, END, other, beams=3, max_new_tokens=NEW)


def test_beam_search_with_an_infix_is_the_naive_one_over_numpy(model, sources):
    """The oracle knows of the model only what it is by definition: no line of it is shared with the search."""
    infix = KVInfix(make_prefix("shared", 0), P)

    def in_numpy(ids, source_length):
        """What a model answers; ids (1, T), of which the first are the source."""
        ids = ids[0].tolist()
        logits = reference_infix(model, ids[:source_length], ids[source_length:], infix["decoder"])
        return torch.from_numpy(logits)[None]

    sources = sources[:5]
    naive = [naive_beam_search(in_numpy, source, len(source), 3, 1.0) for source in sources]
    assert generate_ids(model, sources, END, END, infix, beams=3, max_new_tokens=NEW, batch_size=3) == naive


class Table:
    """A model of 8 tokens, its logits looked up by position and last token; the end is likely: all beams may end."""

    encoder_decoder = False

    def __init__(self, seed):
        self.table = torch.randn(NEW + 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.table[..., END] += 2
        self.config, self.n_positions = {"vocab_size": 8}, NEW + 1

    def parameters(self):
        return iter([self.table])

    def prefill(self, ids, lengths, prefix):
        return Cache([], torch.zeros(len(lengths), 1, 0), lengths, [])

    def step(self, ids, cache):
        states = self.table[cache.position, ids]
        cache.position = cache.position + 1
        return states

    def logits(self, states):
        return states

    def __call__(self, ids, prefix):
        return self.logits(self.table[ids.size(1) - 1, ids[:, -1]])[:, None]


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 4.0])
def test_beam_search_is_the_naive_one_when_all_beams_end(length_penalty):
    for seed in range(25):
        model = Table(seed)
        for beams in (2, 4):
            naive = [naive_beam_search(model, source, None, beams, length_penalty) for source in ([], [1])]
            options = {"beams": beams, "max_new_tokens": NEW, "length_penalty": length_penalty}
            ours = generate_ids(model, [[], [1]], END, END, None, **options)
            assert ours == naive


def test_the_model_ends_early_late_and_never(model, sources):
    """The other tests are worth little unless this holds."""
    for kind in PREFIXES:
        targets = generate_ids(model, sources, END, END, make_prefix(kind, len(sources)), max_new_tokens=NEW)
        lengths = Counter(len(target) for target in targets)
        early, late = sum(lengths[n] for n in range(4)), sum(lengths[n] for n in range(4, NEW))
        assert min(early, late, lengths[NEW]) >= 5, (kind, lengths)


def test_results_do_not_depend_on_the_batch(model, sources):
    prefix = make_prefix("rows", len(sources))
    for beams in (1, 4):
        results = [
            generate_ids(model, sources, END, END, prefix, beams=beams, max_new_tokens=NEW, batch_size=size)
            for size in (1, 16, 1000)
        ]
        assert results[0] == results[1] == results[2]


def test_forbidden_tokens_never_appear(model, sources):
    free = generate_ids(model, sources, END, END, beams=3, max_new_tokens=NEW)
    forbidden = [token for token, _ in Counter(token for target in free for token in target).most_common(20)]
    for options in ({"beams": 3}, {"beams": 1}, {"beams": 1, "sample": True}):
        targets = generate_ids(model, sources, END, END, max_new_tokens=NEW, forbidden=forbidden, **options)
        assert not {token for target in targets for token in target} & set(forbidden)
        given_once = generate_ids(model, sources, END, END, max_new_tokens=NEW, forbidden=iter(forbidden), **options)
        assert not {token for target in given_once for token in target} & set(forbidden)
    never_ends = generate_ids(model, sources, END, END, beams=3, max_new_tokens=NEW, forbidden=[END])
    assert {len(target) for target in never_ends} == {NEW}


def test_bfloat16_and_no_sources(model, sources):
    half = GPT2(CONFIG).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    targets = generate_ids(half, sources, END, END, make_prefix("shared", 0), beams=2, max_new_tokens=NEW)
    assert len(targets) == len(sources) and all(len(target) <= NEW for target in targets)
    assert generate_ids(model, [], END, END) == []


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def huggingface_model(model, position_offset):
    """transformers' GPT-2 with our weights; it puts the first token at P, so its position table is moved there."""
    transformers = pytest.importorskip("transformers", reason="live comparison with transformers' generate")
    config = transformers.GPT2Config(**CONFIG, bos_token_id=END, eos_token_id=END, pad_token_id=END)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    missing, unexpected = theirs.load_state_dict(to_huggingface(model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    with torch.no_grad():
        theirs.transformer.wpe.weight.copy_(model.wpe.weight.roll(P - position_offset, dims=0))
    return theirs


def huggingface_generate(theirs, sources, prefix, **options):
    """Row by row, the prefix as a key/value cache that is already there."""
    targets = []
    for new in huggingface_outputs(theirs, sources, prefix, **options):
        new = new.sequences[0].tolist()
        targets.append(new[: new.index(END)] if END in new else new)
    return targets


def huggingface_outputs(theirs, sources, prefix, **options):
    """What transformers' generate returns for each source, its sequences without the source."""
    from transformers import DynamicCache

    for i, source in enumerate(sources):
        ids = torch.tensor([[*source, END]])
        given = {"attention_mask": torch.ones_like(ids)}
        if prefix is not None:
            cache = DynamicCache()
            for layer, (k, v) in enumerate(prefix_row(prefix, i)["decoder"]):
                rows = (options.get("num_beams", 1), 1, 1, 1)
                cache.update(k.repeat(rows), v.repeat(rows), layer)
            given = {"attention_mask": torch.ones(1, P + ids.size(1), dtype=torch.long), "past_key_values": cache}
        new = theirs.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True, **given,
                              **options)  # fmt: skip
        new.all_ids, new.sequences = new.sequences, new.sequences[:, ids.size(1) :]
        yield new


@pytest.mark.parametrize(
    "kind, beams, length_penalty",
    [("none", 5, 1.0), ("shared", 5, 1.0), ("shared", 2, 0.8), ("offset", 5, 2.0), ("rows", 2, 1.0), ("rows", 5, 0.0)],
)
def test_beam_search_is_transformers(model, sources, kind, beams, length_penalty):
    prefix = make_prefix(kind, len(sources))
    theirs = huggingface_model(model, {"none": P, "offset": 0}.get(kind, P))
    expected = huggingface_generate(
        theirs, sources, prefix, num_beams=beams, do_sample=False, length_penalty=length_penalty
    )
    options = {"beams": beams, "max_new_tokens": NEW, "length_penalty": length_penalty}
    ours = generate_ids(model, sources, END, END, prefix, **options)
    assert ours == expected


@pytest.mark.parametrize("kind, length_penalty, returned", [("none", 1.0, 5), ("shared", 0.8, 3), ("rows", 2.0, 1)])
def test_several_texts_and_their_scores_are_transformers(model, sources, kind, length_penalty, returned):
    prefix = make_prefix(kind, len(sources))
    options = {"num_beams": 5, "num_return_sequences": returned, "do_sample": False, "length_penalty": length_penalty}
    expected = huggingface_outputs(huggingface_model(model, P), sources, prefix, **options)
    options = {"beams": 5, "max_new_tokens": NEW, "length_penalty": length_penalty, "returned": returned}
    ours = search_ids(model, sources, END, END, prefix, **options, batch_size=7)
    for found, theirs in zip(ours, expected, strict=True):
        rows = [row[: row.index(END)] if END in row else row for row in theirs.sequences.tolist()]
        assert [ids for ids, _ in found] == rows and len(rows) == returned
        assert [score for _, score in found] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-5)


def test_the_score_of_a_greedy_text_is_transformers(model, sources):
    """transformers has it token by token: normalised, without what is forbidden."""
    theirs, forbidden = huggingface_model(model, P), list(range(50, 60))
    options = {"do_sample": False, "bad_words_ids": [[i] for i in forbidden]}
    expected = list(huggingface_outputs(theirs, sources, None, **options))
    ours = search_ids(model, sources, END, END, beams=1, max_new_tokens=NEW, forbidden=forbidden, length_penalty=0.5)
    for [(ids, score)], output in zip(ours, expected, strict=True):
        row = output.sequences[0].tolist()
        length = min(len(ids) + 1, NEW)  # with the end token
        assert row[: len(ids)] == ids
        each = theirs.compute_transition_scores(output.all_ids, output.scores, normalize_logits=True)[0, :length]
        assert score == pytest.approx(each.sum().item() / length**0.5, abs=1e-5)


def test_draws_are_as_if_each_source_came_so_many_times(model, sources):
    prefix = make_prefix("rows", len(sources))
    options = {"beams": 1, "max_new_tokens": NEW, "sample": True, "batch_size": 1000}
    ours = search_ids(model, sources, END, END, prefix, **options, returned=3, generator=torch.Generator())
    assert {len(found) for found in ours} == {3} and len({tuple(ids) for found in ours for ids, _ in found}) > 100
    greedy = search_ids(model, sources, END, END, prefix, **{**options, "top_k": 1}, returned=2)
    once = search_ids(model, sources, END, END, prefix, beams=1, max_new_tokens=NEW)
    for two, [(ids, score)] in zip(greedy, once, strict=True):
        assert [row for row, _ in two] == [ids] * 2 and [s for _, s in two] == pytest.approx([score] * 2, abs=1e-5)


def test_greedy_is_transformers(model, sources):
    prefix = make_prefix("rows and offset", len(sources))
    expected = huggingface_generate(huggingface_model(model, 0), sources, prefix, do_sample=False)
    assert generate_ids(model, sources, END, END, prefix, beams=1, max_new_tokens=NEW) == expected


def test_sampling_is_transformers(model, sources):
    """The same draws from the same seed, with tokens forbidden and all three knobs turned."""
    theirs = huggingface_model(model, P)
    for i, source in enumerate(sources[:20]):
        torch.manual_seed(i)
        options = {"temperature": 1.3, "top_k": 30, "top_p": 0.8}
        [expected] = huggingface_generate(
            theirs, [source], None, do_sample=True, bad_words_ids=[[i] for i in range(50, 60)], **options
        )
        assert draw(model, [source], seed=i, forbidden=range(50, 60), **options) == [expected]


# ---------------------------------------------------------------------------------------------------------------------
# sampling


def draw(model, sources, seed=0, new=NEW, **options):
    options = {"beams": 1, "sample": True, "generator": torch.Generator().manual_seed(seed), **options}
    return generate_ids(model, sources, END, END, max_new_tokens=new, **options)


def test_one_token_to_choose_from_is_greedy(model, sources):
    greedy = generate_ids(model, sources, END, END, beams=1, max_new_tokens=NEW)
    assert draw(model, sources, top_k=1) == draw(model, sources, top_p=1e-9) == greedy
    assert draw(model, sources, temperature=1e-4) == greedy


def test_seeds_reproduce(model, sources):
    assert draw(model, sources, seed=5) == draw(model, sources, seed=5) != draw(model, sources, seed=6)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_k": 4}, {"temperature": 1.5, "top_p": 0.7}])
def test_draws_follow_the_distribution(model, options):
    """First tokens of 4000 draws against the probabilities computed from the definition."""
    n, source = 4000, [11, 12, 13]
    log_probs = next_log_probs(model, [*source, END], None)
    weights = [math.exp(log_prob / options.get("temperature", 1.0)) for log_prob in log_probs]
    order = sorted(range(V), key=lambda i: -weights[i])
    order = order[: options.get("top_k", V)]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass < options.get("top_p", 1.0):
            kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    assert len(kept) > 2

    targets = draw(model, [source] * n, new=1, batch_size=n, **options)
    counts = Counter(target[0] if target else END for target in targets)
    assert set(counts) <= set(kept)
    expected = {i: n * weights[i] / total for i in kept}
    often = [i for i in kept if expected[i] >= 5]
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in often)
    assert chi_square < len(often) + 4 * math.sqrt(2 * len(often))


# ---------------------------------------------------------------------------------------------------------------------
# text, and what is refused


class Letters:
    """A tokenizer of characters: their code minus 30, so that a blank is 2; a line break is 1."""

    end_id, pad_id, newline_ids, special, rank_to_id = END, END, [1], {"<|endoftext|>": END}, range(END)
    added: dict[str, int] = {}

    def encode(self, text):
        return [1 if c == "\n" else ord(c) - 30 for c in text]

    def decode(self, ids):
        return "".join("\n" if i == 1 else chr(i + 30) for i in ids)


def test_texts(model):
    tokenizer = Letters()
    texts = ["name : A", "", "x"]
    ids = [tokenizer.encode(f" {text} ") for text in texts]
    assert ids[1] == [2, 2]
    for forbidden in ([1], ()):
        targets = generate_ids(model, ids, END, END, None, beams=3, max_new_tokens=NEW, forbidden=forbidden)
        options = {} if forbidden else {"forbidden": ()}
        expected = [tokenizer.decode(target).strip() for target in targets]
        assert generate(model, tokenizer, texts, beams=3, max_new_tokens=NEW, **options) == expected
    with pytest.raises(InputError, match="list of texts"):
        generate(model, tokenizer, "one text")
    with pytest.raises(TypeError, match="beam_width"):  # no such option
        generate(model, tokenizer, texts, beam_width=3)


def test_a_source_that_just_fits(model):
    """Prefix 3 + source 50 + start token + 11 = 12 - 1 that are fed back: one more than 64 positions hold."""
    prefix = make_prefix("shared", 0)
    source = [9] * 50
    options = {"beams": 2, "max_new_tokens": NEW}
    assert len(generate_ids(model, [source[:-1], [9]], END, END, prefix, forbidden=[END], **options)[0]) == NEW
    with pytest.raises(InputError, match="source 2 of 3, with 50 tokens, needs 65 .* the model has 64"):
        generate_ids(model, [[9], source, [9]], END, END, prefix, **options)
    with pytest.raises(InputError, match="source 1 of 1, the longest with 70 tokens: .*shorten"):
        generate_ids(model, [[9] * 70], END, END, None, beams=2, max_new_tokens=NEW)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beams": 0}, "beams is 0: it must be at least 1"),
        ({"beams": 51}, "beams is 51: it must be at most 50"),
        ({"beams": 41, "forbidden": range(20)}, "beams is 41: it must be at most 40"),
        ({"beams": 41, "forbidden": iter(range(20))}, "beams is 41: it must be at most 40"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"sample": True, "beams": 5}, "use 1 beam"),
        ({"returned": 6, "beams": 5}, "returned is 6: it must be at most the 5 beams"),
        ({"returned": 0}, "returned is 0: it must be at least 1"),
        ({"prefix": {"decoder": torch.zeros(L, 2, 3, H, P, D)}}, "the prefix has 3 rows for 2 sources: give one"),
    ],
)
def test_senseless_options_are_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        generate_ids(model, [[1], [2, 3]], END, END, **options)


def test_finished_texts_leave_the_batch(model, sources, monkeypatch):
    """They end one after the other, so a text that has ended must count as ended at every later step."""
    rows, step = [], model.step
    monkeypatch.setattr(model, "step", lambda ids, cache: rows.append(len(ids)) or step(ids, cache))
    texts = generate_ids(model, sources, END, END, None, beams=1, max_new_tokens=NEW, batch_size=len(sources))
    expected, size = [], len(sources)
    for t in range(NEW):
        if size:
            expected.append(size)
        running = sum(len(text) > t for text in texts)
        size = running if running <= 0.75 * size else size
    assert rows == expected and len(set(rows)) > 2


def test_where_nothing_may_be_written_there_is_still_one_text(model):
    """All beams of the last step are barred: each of the tokens that are allowed has been written."""
    allowed = [5, 6, 7, 8, END]
    options = {"forbidden": [i for i in range(model.config["vocab_size"]) if i not in allowed], "no_repeat_ngram": 1,
               "beams": 2, "min_new_tokens": 6, "max_new_tokens": 6}  # fmt: skip
    assert len(generate_ids(model, [[3, 4]], END, END, None, **options)) == 1
