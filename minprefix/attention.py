"""The one attention function: queries against segments of keys and values (prefix, source, tokens).

Shapes: B rows of queries, H heads, T query tokens, S keys of a segment, D head dimension, L layers, P prefix length.
"""

from dataclasses import dataclass

import torch

from minprefix.files import InputError


def attend(q, segments):
    """Scaled dot-product attention of q (B, H, T, D) over all keys of all segments at once -> (B, H, T, D).

    A segment is (k, v, mask): k and v (b, H, S, D); mask None, or (T, S) or (b, 1, 1, S) to be added to the scores, 0
    where a query may look and -inf where not. b divides B, and row i of a segment serves the B/b consecutive query
    rows from i*B/b on: a prefix for the whole batch has b = 1, the source of an example serves all of its beams.
    """
    q = q * q.size(-1) ** -0.5
    if q.size(2) > 1 and all(len(k) in (1, len(q)) for k, _, _ in segments):
        return _attend_joined(q, segments)
    return _attend_apart(q, segments)


def _attend_joined(q, segments):
    """Training, and reading of sources: few products of many rows each, for which the keys are put side by side."""
    B, _, T, _ = q.shape
    k = torch.cat([k.expand(B, -1, -1, -1) for k, _, _ in segments], dim=2)
    v = torch.cat([v.expand(B, -1, -1, -1) for _, v, _ in segments], dim=2)
    scores = q @ k.transpose(-1, -2)
    if any(mask is not None for _, _, mask in segments):
        masks = [q.new_zeros(1, 1, 1, k.size(2)) if mask is None else mask for k, _, mask in segments]
        masks = [mask.expand(1, 1, -1, -1) if mask.dim() == 2 else mask for mask in masks]
        rows, queries = max(map(len, masks)), max(mask.size(2) for mask in masks)
        scores = scores + torch.cat([mask.expand(rows, 1, queries, -1) for mask in masks], dim=3)
    return scores.softmax(dim=-1) @ v


def _attend_apart(q, segments):
    """A step of generation: scores are put side by side instead of keys, and no segment is ever copied."""
    scores = []
    for k, _, mask in segments:
        score = _shared_matmul(q, k.transpose(-1, -2))
        if mask is not None:
            score = score + (mask if mask.dim() == 2 else mask.repeat_interleave(q.size(0) // k.size(0), dim=0))
        scores.append(score)
    if len(segments) == 1:
        return _shared_matmul(scores[0].softmax(dim=-1), segments[0][1])
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([k.size(-2) for k, _, _ in segments], dim=-1)
    return sum(_shared_matmul(w, v) for w, (_, v, _) in zip(weights, segments, strict=True))


def _shared_matmul(x, matrix):
    """x (B, H, T, X) @ matrix (b, H, X, Y) -> (B, H, T, Y); row i of `matrix` serves B/b consecutive rows of x."""
    B, H, T, X = x.shape
    b, _, _, Y = matrix.shape
    if b == B:
        return x @ matrix
    x = x.view(b, B // b, H, T, X).transpose(1, 2).reshape(b, H, B // b * T, X)  # fold the rows, copy no keys
    return (x @ matrix).view(b, H, B // b, T, Y).transpose(1, 2).reshape(B, H, T, Y)


def causal_mask(T, like):
    """(T, T): token t may look at tokens 0..t. dtype and device of the tensor `like`."""
    return torch.full((T, T), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def real_tokens(lengths, S):
    """(B, S), true at the tokens of right-padded rows of `lengths` (B,)."""
    return torch.arange(S, device=lengths.device) < lengths[:, None]


def padding_mask(real, like):
    """(B, 1, 1, S) from (B, S), true or 1 at the tokens: the padding is hidden. dtype and device of `like`."""
    pads = real.to(like.device) == 0
    return torch.zeros(pads.shape, dtype=like.dtype, device=like.device).masked_fill(pads, float("-inf"))[:, None, None]


def prefix_segments(prefix, site, n_layer, like):
    """What each layer sees of a prefix at one site: for each layer a list with one segment for `attend`, or none.

    prefix: None, or a dict site -> (L, 2, H, P, D) for the whole batch, or (L, 2, b, H, P, D) for b rows, or a stack
    of several prefixes (see prefix.py) of which each row takes one.
    The segments have the dtype and device of the tensor `like`.
    """
    if prefix_length(prefix, site) == 0:
        return [[]] * n_layer
    kv, mask = prefix[site].to(like), None
    if kv.dim() == 5:
        kv = kv.unsqueeze(2)
    if (rows := getattr(prefix, "rows", None)) is not None:
        kv, mask = kv[:, :, rows], padding_mask(real_tokens(prefix.lengths[site][rows], kv.size(-2)), like)
    return [[(k, v, mask)] for k, v in kv.unbind(0)]


def check_prefix(prefix, sites, B):
    """InputError unless each tensor of a prefix is for one of the model's sites {site: (L, H, D)} and B rows."""
    for site, kv in (prefix or {}).items():
        if site not in sites:
            raise InputError(f"the prefix is for a site {site!r}, this model has {', '.join(sites)}")
        L, H, D = sites[site]
        rows = row_count(prefix, kv)
        if (kv.dim() not in (5, 6) or kv.shape[:2] != (L, 2) or (kv.size(-3), kv.size(-1)) != (H, D)
                or rows not in (1, B)):  # fmt: skip
            shape = f"({L}, 2, {H}, length, {D}), or ({L}, 2, {B}, {H}, length, {D}) for {B} rows"
            raise InputError(f"the prefix for {site!r} has shape {tuple(kv.shape)}, needed is {shape}")


def row_count(prefix, kv):
    """How many rows a prefix's tensor kv is for, 1 for the whole batch."""
    if getattr(prefix, "rows", None) is not None:
        return len(prefix.rows)
    return kv.size(2) if kv.dim() == 6 else 1


def prefix_length(prefix, site):
    """P, the number of virtual tokens at a site."""
    return 0 if prefix is None or site not in prefix else prefix[site].size(-2)


def first_position(prefix):
    """Position id of the (decoder's) first token: what the prefix was trained with, by default its length.

    Of a stack of prefixes (B,), one for each row, on the CPU.
    """
    offset, rows = getattr(prefix, "position_offset", None), getattr(prefix, "rows", None)
    if offset is None:
        return prefix_length(prefix, "decoder")
    return offset if rows is None else offset[rows]


def position_ids(ids, start, n_positions):
    """(T,) for tokens ids (B, T), the first at `start`, or (B, T) for starts (B,); InputError if they are too many."""
    T, last = ids.size(1), int(max(start)) if torch.is_tensor(start) else start
    if last + T > n_positions:
        raise InputError(
            f"{T} tokens from position {last} on do not fit the model's {n_positions} positions: "
            "shorten the text (--max-source cuts sources) or the prefix"
        )
    positions = torch.arange(T, device=ids.device)
    return positions + (start.to(ids.device)[:, None] if torch.is_tensor(start) else start)


@dataclass
class Cache:
    """Keys and values of a generation under way: B examples, R = B * beams rows, the rows of an example adjacent.

    fixed: per layer the segments of self-attention that no step changes, with 1 or B rows: the prefix, GPT-2's source.
    cross: likewise of cross-attention: BART's prefix and source; None for GPT-2.
    suffix: per layer (k, v) (R, H, t, D) of the tokens generated so far, None before the first.
    position: (R,) position ids of the next token.
    """

    fixed: list
    cross: list | None
    suffix: list
    position: torch.Tensor

    def segments(self, layer):
        """What self-attention sees before the next token."""
        suffix = self.suffix[layer]
        return [*self.fixed[layer], *([(*suffix, None)] if suffix else [])]

    def append(self, layer, k, v):
        """Take in one token's keys and values (R, H, 1, D)."""
        past = self.suffix[layer]
        self.suffix[layer] = (torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)) if past else (k, v)

    def select(self, rows):
        """Go on from these rows (R',), still the same number for every example: surviving beams, or copies."""
        self.suffix = [kv and (kv[0][rows], kv[1][rows]) for kv in self.suffix]
        self.position = self.position[rows]
