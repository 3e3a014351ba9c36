"""Greedy decoding, sampling and beam search over a cache that holds the prefix and each source once.

A model offers `prefill`, `step` and `logits` (see gpt2.py); `generate_ids` does not know which model it is.
Shapes: B examples, K beams, R = B or B * K rows, S source tokens, N new tokens at most, V vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minprefix.core.cache import Cache
from minprefix.core.cuda_graphs import DecodingGraphs, decoding_graphs
from minprefix.core.encode import check_vocabulary, encode_sources, end_ids, start_id
from minprefix.core.kernels import packed_weights
from minprefix.core.model import Model, Tokenizer
from minprefix.core.prefix_kv import AnyPrefix, first_position, prefix_like, row_count, select_rows, tensors_of
from minprefix.system.errors import InputError

COMPACT_BELOW = 0.75  # drop finished texts once at most 75% are still running
CHECK_EVERY = {"cuda": 8}  # on CUDA look for finished texts, which waits for the GPU, every 8 tokens; else at each
Constrain = Callable[[Tensor, Tensor], None]  # scores (R, V), past (R, t): sets what may not follow to -inf


@dataclass(frozen=True)
class Search:
    """How a text is searched for, or with `sample` drawn at random: the options of `generate` and `generate_ids`."""

    beams: int = 5  # of beam search; 1: greedy decoding, the likeliest token at each step
    max_new_tokens: int = 64  # at most so many tokens, the end token among them
    min_new_tokens: int = 0  # at least so many tokens before the end token
    length_penalty: float = 1.0  # the search is for the highest log-probability / length ** length_penalty
    no_repeat_ngram: int = 0  # no sequence of so many tokens occurs twice in a text (0: any may)
    sample: bool = False  # draw each token from the model's distribution; needs beams=1
    temperature: float = 1.0  # sample: the logits are divided by it first
    top_k: int = 0  # sample: only from the k likeliest tokens (0: from all)
    top_p: float = 1.0  # sample: then only from the fewest likeliest tokens whose probabilities add up to p
    returned: int = 1  # texts for each source: the best of the beams, or with sample so many draws
    scored: bool = True  # work out the scores of greedy texts and draws, too (else they are 0): 2 to 4% of their time

    def check(self, model: Model, forbidden: Iterable[int] = (), ends: int = 1) -> None:
        """InputError where an option makes no sense. forbidden: ids never written; ends: how many ids end a text."""
        allowed, most = model.config["vocab_size"] - len(set(forbidden)), self.max_new_tokens
        fit = allowed // (1 + ends)  # beam search compares so many continuations of each beam
        for key, fine, needed in (
            ("beams", self.beams >= 1, "at least 1"),
            ("beams", self.beams <= fit, f"at most {fit}, 1/{1 + ends} of the tokens that may be written"),
            ("max_new_tokens", most >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= most, f"from 0 to {most}, the most new tokens"),
            ("length_penalty", -20 < self.length_penalty < 20, "between -20 and 20"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 (any tokens may be repeated) or more"),
            ("temperature", 1e-6 <= self.temperature < 1e6, "between 1e-6 and 1e6"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("returned", self.returned >= 1, "at least 1"),
            ("returned", self.sample or self.returned <= self.beams, f"at most the {self.beams} beams"),
        ):
            if not fine:
                raise InputError(f"{key} is {getattr(self, key)}: it must be {needed}")
        if self.sample and self.beams > 1:
            raise InputError(f"sample with {self.beams} beams is not supported: use 1 beam, or leave out sample")


def generate(
    model: Model, tokenizer: Tokenizer, sources: list[str], prefix: AnyPrefix | None = None, *,
    max_source: int | None = None, what: str | None = "sources", one_line: bool = True, **options: Any,
) -> list[str]:  # fmt: skip
    """The text that the model writes for each source text: list of str -> list of str, without white space around.

    See `generate_scored` for the options, and for several texts with their scores.
    """
    found = generate_scored(model, tokenizer, sources, prefix, max_source=max_source, what=what, one_line=one_line,
                            **{"scored": False, **options})  # fmt: skip
    return [texts[0][0] for texts in found]


def generate_scored(
    model: Model, tokenizer: Tokenizer, sources: list[str], prefix: AnyPrefix | None = None, *,
    max_source: int | None = None, what: str | None = "sources", one_line: bool = True, **options: Any,
) -> list[list[tuple[str, float]]]:  # fmt: skip
    """The texts that the model writes for each source, with their scores: the best of the beams first, or the draws.

    A score is the sum of the tokens' log-probabilities / length ** length_penalty, the end token included. Of a greedy
    text or a draw they are the probabilities among the tokens that were allowed, before temperature, top_k and top_p.
    A text ends with one of `end_ids`, which is left out of it if it is a special token.
    max_source, what: longer sources are cut, and that is said, see `encode_sources`. one_line: line breaks are
    forbidden, as in the paper. options: those of `Search` (beams=5, max_new_tokens=64, ...) and of `search_ids`;
    BART's first and last token are by default those of its config.json.
    InputError as in `search_ids`.
    """
    if isinstance(sources, str):
        raise InputError("sources is a single text: give a list of texts")
    check_vocabulary(tokenizer, model)
    if options.get("sample"):
        options.setdefault("beams", 1)
    ends = end_ids(model, tokenizer, prefix)
    options.setdefault("forbidden", [i for i in tokenizer.newline_ids if i not in ends] if one_line else ())
    if model.encoder_decoder:
        options.setdefault("forced_first", model.config["forced_bos_token_id"])
        options.setdefault("forced_last", model.config["forced_eos_token_id"])
    ids = encode_sources(sources, tokenizer, model, max_source, what)
    with packed_weights(model):
        found = search_ids(model, ids, start_id(model, tokenizer), ends, prefix, keep_end=True, **options)
    special = {*tokenizer.special.values(), tokenizer.end_id}
    return [
        [(tokenizer.decode(i for i in target if i not in special).strip(), score) for target, score in targets]
        for targets in found
    ]


def generate_ids(
    model: Model, sources: list[list[int]], first_id: int, ends: int | list[int], prefix: AnyPrefix | None = None,
    **options: Any,
) -> list[list[int]]:  # fmt: skip
    """The best that `search_ids` finds for each source: list of token ids -> list of token ids."""
    options = {"scored": False, **options}
    return [targets[0][0] for targets in search_ids(model, sources, first_id, ends, prefix, **options)]


@torch.inference_mode()
def search_ids(
    model: Model, sources: list[list[int]], first_id: int, ends: int | list[int], prefix: AnyPrefix | None = None, *,
    generator: torch.Generator | None = None, forbidden: Iterable[int] = (), forced_first: int | None = None,
    forced_last: int | None = None, keep_end: bool = False, batch_size: int = 16, progress: bool = False,
    **options: Any,
) -> list[list[tuple[list[int], float]]]:  # fmt: skip
    """What the model makes of each source: list of token ids -> list of (token ids without first_id, score).

    first_id: the token that the first new one follows, see `start_id`. ends: the token or tokens of which any ends a
    text; it is in the result only with keep_end.
    prefix: as the model takes it; a tensor with a row dimension has one row for each source (or one for all).
    options: those of `Search`, which says what they mean.
    generator: for `sample`, a torch.Generator on the model's device. Draws depend on batch_size; other
    texts only by rounding, which differs with a batch's shape: in bfloat16 it can change them.
    forbidden: ids that are never generated. forced_first: the id of the first token; forced_last: that of the token
    number max_new_tokens, if a text gets so long. progress: show a bar.
    InputError: an option makes no sense, or a source is too long for the model.
    """
    search, forbidden, ends = Search(**options), list(forbidden), [ends] if isinstance(ends, int) else list(ends)
    search.check(model, forbidden, len(ends))
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1")
    rows = {row_count(prefix, kv) for kv in tensors_of(prefix).values()}
    if wrong := rows - {1, len(sources)}:
        count = f"{min(wrong)} rows for {len(sources)} sources"
        raise InputError(f"the prefix has {count}: give one for each, or one for all")
    weight = next(model.parameters())
    prefix, device = prefix_like(prefix, weight), weight.device  # copied once, not for each batch
    forbidden_ids = torch.tensor(forbidden, dtype=torch.long, device=device)
    end = torch.tensor(ends, device=device)

    def constrain(scores: Tensor, past: Tensor) -> None:
        """Set the scores (R, V) of tokens that may not follow the generated ones, past (R, t), to -inf."""
        t = past.size(1)
        scores[:, forbidden_ids] = float("-inf")
        if t < search.min_new_tokens:
            scores[:, end] = float("-inf")
        if search.no_repeat_ngram:
            ban_repeated_ngrams(scores, past, search.no_repeat_ngram)
        forced = forced_last if t + 1 == search.max_new_tokens else None
        forced = forced_first if t == 0 and forced is None else forced
        if forced is not None:
            scores.fill_(float("-inf"))[:, forced] = 0.0

    def choose(logits: Tensor) -> Tensor:
        return sample_next(logits, search, generator) if search.sample else logits.argmax(dim=-1)

    graphs = decoding_graphs(model, search.beams, search.max_new_tokens)
    # The longest first: batches of like lengths, and what does not fit (model or memory) fails at once.
    draws = search.returned if search.sample else 1
    order = sorted(list(range(len(sources))) * draws, key=lambda i: -len(sources[i]))
    targets: list[list[tuple[list[int], float]]] = [[] for _ in sources]
    with tqdm(total=len(order), unit="source", disable=not progress) as bar:
        for batch in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            cache = prefill(model, sources, batch, prefix, search.max_new_tokens, device)
            start = torch.full((len(batch),), first_id, device=device)
            if search.beams > 1:
                tokens, scores = beam_search(model, cache, start, end, search, constrain, graphs)
            else:
                tokens, scores = greedy_or_sample(model, cache, start, end, search, constrain, graphs, choose)
            for i, rows, values in zip(batch, tokens.tolist(), scores.tolist(), strict=True):
                for row, value in zip(rows, values, strict=True):
                    if targets[i] and value == float("-inf"):  # a beam that the constraints left nothing to write
                        continue
                    length = next((n for n, token in enumerate(row) if token in ends), len(row))
                    targets[i].append((row[: length + keep_end], value))
            bar.update(len(batch))
    return targets


def greedy_or_sample(
    model: Model, cache: Cache, ids: Tensor, ends: Tensor, search: Search, constrain: Constrain,
    graphs: DecodingGraphs | None, choose: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """After the start tokens ids (B,), at each step the token that `choose` picks -> a text and score per example.

    Texts (B, 1, N), filled up with ends[0]; scores (B, 1). ends: (E,), the tokens of which any ends a text.
    """
    max_new_tokens = search.max_new_tokens
    tokens = ends[0].repeat(len(ids), max_new_tokens)
    sums = torch.zeros(len(ids), device=ids.device)  # of log-probabilities
    lengths = torch.zeros_like(sums) if search.scored else torch.ones_like(sums)
    place = torch.arange(len(ids), device=ids.device)  # of the examples still in the batch, in `tokens`
    unfinished, every = torch.ones_like(ids, dtype=torch.bool), CHECK_EVERY.get(ids.device.type, 1)
    graph = graphs.load(cache) if graphs else None
    for t in range(max_new_tokens):
        logits = (graph.step(ids) if graph else model.logits(model.step(ids, cache))).float()
        constrain(logits, tokens[place, :t])
        ids = choose(logits)
        if search.scored:
            log_probs = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=-1)
            sums[place] += log_probs.where(unfinished, 0.0)
            lengths[place] += unfinished
        ids = tokens[place, t] = ids.where(unfinished, ends[0])
        unfinished = ~torch.isin(ids, ends)
        if (t + 1) % every:
            continue
        running = unfinished.nonzero()[:, 0]
        if len(running) == 0:
            break
        if not graph and len(running) <= COMPACT_BELOW * len(ids):
            ids, place, unfinished = ids[running], place[running], unfinished[running]
            cache.keep(running)
    return tokens[:, None], (sums / lengths**search.length_penalty)[:, None]


def ban_repeated_ngrams(scores: Tensor, past: Tensor, n: int) -> None:
    """Set those scores (R, V) to -inf whose token would complete an n-gram that is in past (R, t) already."""
    if past.size(1) < n:
        return
    ngrams = past.unfold(1, n, 1)  # (R, t - n + 1, n)
    repeats = (ngrams[:, :, :-1] == past[:, None, past.size(1) - n + 1 :]).all(dim=-1)
    # Added, not set: a token may end several n-grams, of which only some are repeats.
    scores.scatter_add_(1, ngrams[:, :, -1], scores.new_zeros(repeats.shape).masked_fill(repeats, -torch.inf))


def sample_next(logits: Tensor, search: Search, generator: torch.Generator | None) -> Tensor:
    """Logits (B, V) -> a sampled token id for each row (B,)."""
    logits = logits / search.temperature
    if search.top_k:
        least = logits.topk(min(search.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if search.top_p < 1:
        ascending, index = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - search.top_p
        drop[:, -1] = False  # the likeliest stays
        logits = logits.masked_fill(drop.scatter(1, index, drop), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def beam_search(
    model: Model, cache: Cache, ids: Tensor, ends: Tensor, search: Search, constrain: Constrain,
    graphs: DecodingGraphs | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """After the start tokens ids (B,), the best sequences of each example, and their scores, for search.returned = J.

    Sequences (B, J, N), filled up with ends[0]; scores (B, J), best first.
    The search of HuggingFace's generate with early_stopping=False. ends: (E,), the tokens of which any ends a text. At
    each step the (1 + E) K best continuations of all beams are looked at: no more than E K of them end. The K best of
    those that do not end are the running beams of the next step; those that end, if they are among the K best of all,
    compete for the K places of the finished. An example is over when its best running beam, scored at its present
    length, is no better than its worst finished one.
    """
    K, B, max_new_tokens, inf = search.beams, len(ids), search.max_new_tokens, float("inf")
    result = ends[0].repeat(B, search.returned, max_new_tokens)
    result_scores = torch.zeros((B, search.returned), device=ids.device)
    place = torch.arange(B, device=ids.device)  # of the examples that are not over, in `result`
    graph, first = None, 1  # all beams start equal, so one suffices
    if graphs:
        graph, first = graphs.load(cache), K
        cache, ids = graph.cache, ids.repeat_interleave(K)
    scores = torch.zeros((B, first), device=ids.device)  # sums of log-probabilities
    scores[:, 1:] = -inf
    tokens = result[:, :1].repeat(1, first, 1)  # (B, K, N): what the beams have written, nothing yet
    finished_scores = scores.new_full((B, K), -inf)  # best first
    finished = result[:, :1].repeat(1, K, 1)
    improvable, every = torch.ones_like(place, dtype=torch.bool), CHECK_EVERY.get(ids.device.type, 1)
    for t in range(max_new_tokens):
        logits = graph.step(ids) if graph else model.logits(model.step(ids, cache))
        log_probs = logits.float().log_softmax(dim=-1)  # (R, V)
        constrain(log_probs, tokens[:, :, :t].flatten(0, 1))
        log_probs += scores.view(-1, 1)
        V, rows_each = log_probs.size(-1), scores.size(1)  # rows_each: `first`, then K
        candidate_scores, index = log_probs.view(-1, rows_each * V).topk((1 + len(ends)) * K)  # (B, (1 + E) K)
        parent, token = index // V, index % V
        example = torch.arange(len(scores), device=ids.device)[:, None]  # (B, 1), indexes what is (B, K, ...)
        candidates = tokens[example, parent]
        candidates[:, :, t] = token
        over = torch.isin(token, ends) if t + 1 < max_new_tokens else torch.ones_like(token, dtype=torch.bool)

        length = (t + 1) ** search.length_penalty  # of the new tokens, the end token among them
        barred = ~(over & improvable[:, None])
        ended_scores = (candidate_scores / length).masked_fill(barred, -inf)[:, :K]
        finished_scores, best = torch.cat([finished_scores, ended_scores], dim=1).topk(K)
        finished = torch.cat([finished, candidates[:, :K]], dim=1)[example, best]

        scores, best = candidate_scores.masked_fill(over, -inf).topk(K)
        tokens = candidates[example, best]
        improvable &= scores[:, 0] / length > finished_scores[:, -1]
        cache.reorder((example * rows_each + parent.gather(1, best)).flatten())
        if (t + 1) % every == 0:
            running = improvable.nonzero()[:, 0]
            if len(running) == 0:  # always so after the last step: there `over` is all true
                break
            if not graph and len(running) <= COMPACT_BELOW * len(scores):
                result[place] = finished[:, : search.returned]
                result_scores[place] = finished_scores[:, : search.returned]
                place = place[running]
                cache.keep(running)
                scores, tokens, finished_scores, finished, improvable = (
                    x[running] for x in (scores, tokens, finished_scores, finished, improvable)
                )
        ids = tokens[:, :, t].flatten()
    result[place], result_scores[place] = finished[:, : search.returned], finished_scores[:, : search.returned]
    return result, result_scores


def prefill(
    model: Model, sources: list[list[int]], batch: list[int], prefix: AnyPrefix | None, max_new_tokens: int,
    device: torch.device,
) -> Cache:  # fmt: skip
    """The Cache of the sources whose numbers are `batch`, longest first; InputError if the longest is too long."""
    lengths = [len(sources[i]) for i in batch]
    # Nothing looks at padding, so any id will do; at least one column, since a model may not take empty rows.
    ids = torch.zeros((len(batch), max(1, lengths[0])), dtype=torch.long)
    for row, i in zip(ids, batch, strict=True):
        row[: len(sources[i])] = torch.tensor(sources[i], dtype=torch.long)
    if model.encoder_decoder and lengths[-1] == 0:
        raise InputError(f"source {batch[-1] + 1} of {len(sources)} has no token: BART's encoder needs at least one")
    part = select_rows(prefix, batch)
    try:
        cache = model.prefill(ids.to(device), torch.tensor(lengths), part)
    except InputError as error:
        longest = f"source {batch[0] + 1} of {len(sources)}, the longest with {lengths[0]} tokens"
        raise InputError(f"{longest}: {error}") from error
    # The first new token's position; the last new token is never fed back and needs none.
    first = torch.as_tensor(first_position(part)) + (0 if model.encoder_decoder else torch.tensor(lengths))
    most = int(first.argmax())
    need, room = int(first.flatten()[most]) + max_new_tokens, model.n_positions
    if need > room:
        raise InputError(
            f"source {batch[most] + 1} of {len(sources)}, with {lengths[most]} tokens, needs {need} positions with its "
            f"prefix and {max_new_tokens} new tokens, but the model has {room}: lower max_new_tokens, or shorten the "
            "source or the prefix"
        )
    return cache
