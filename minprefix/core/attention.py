"""The one attention function: queries against segments of keys and values (prefix, source, tokens).

Shapes: B rows of queries, H heads, T query tokens, S keys of a segment, D head dimension, L layers, P prefix length.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from minprefix.system.errors import InputError

ROOM = 64  # slots that a cache grows by
KV = tuple[Tensor, Tensor]  # keys and values of some tokens in a layer, (B, H, S, D)
Segment = tuple[Tensor, Tensor, Tensor | None]  # keys, values, mask: see `attend`
Look = Callable[[Tensor, Tensor], list[Segment]]  # a layer's own keys and values -> what its tokens look at
PrefixDict = dict[str, Tensor]  # site -> keys and values: see `prefix_segments`


class FoldedPrefix(dict[str, Tensor]):
    """What `model(..., prefix=)` takes: site -> (L, 2, H, P, D), keys and values.

    position_offset: position id of the first real token. info: what the prefix file says of itself (base model, task).
    """

    method = "prefix"  # of train.py, as its files say

    def __init__(self, kv: PrefixDict, position_offset: int, info: dict[str, str] | None = None):
        super().__init__(kv)
        self.position_offset = position_offset
        self.info = info or {}


class FoldedInfix(FoldedPrefix):
    """A prefix that stands after the source: only the target's tokens see it, and their positions follow its own.

    `generate` takes it as it is, for a model's `hidden` or forward it is `at(source_lengths)`.
    """

    method = "infix"
    source_lengths: Tensor  # (B,), set by `at`

    def at(self, source_lengths: Tensor) -> "FoldedInfix":
        """The infix behind the first source_lengths (B,) tokens of the rows."""
        infix = copy.copy(self)
        infix.source_lengths = source_lengths
        return infix


class PrefixStack(dict[str, Tensor]):
    """Several prefixes for one batch: site -> (L, 2, N, H, P, D) for N of them, see `stack_prefixes` in prefix.py.

    lengths: site -> (N,), P is the longest. position_offsets: (N,). rows: (B,), which of the prefixes each row takes.
    """

    def __init__(self, kv: PrefixDict, lengths: dict[str, Tensor], position_offsets: Tensor, rows: Tensor):
        super().__init__(kv)
        self.lengths, self.position_offsets, self.rows = lengths, position_offsets, rows


def attend(q: Tensor, segments: list[Segment]) -> Tensor:
    """Scaled dot-product attention of q (B, H, T, D) over all keys of all segments at once -> (B, H, T, D).

    A segment is (k, v, mask): k and v (b, H, S, D), b = B or, for what all rows share, 1; mask None, or (T, S) or
    (b, 1, 1 or T, S) to be added to the scores, 0 where a query may look and -inf where not.
    """
    k, v, mask = join(segments, len(q))
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.size(-1) ** -0.5) @ k.mT
    return (scores if mask is None else scores + mask).softmax(dim=-1) @ v


def join(segments: list[Segment], B: int) -> Segment:
    """Segments side by side as one, for B rows."""
    if len(segments) == 1 and len(segments[0][0]) == B:
        return segments[0]
    k = torch.cat([k.expand(B, -1, -1, -1) for k, _, _ in segments], dim=2)
    v = torch.cat([v.expand(B, -1, -1, -1) for _, v, _ in segments], dim=2)
    if all(mask is None for _, _, mask in segments):
        return k, v, None
    masks = [k.new_zeros(1, 1, 1, k.size(2)) if mask is None else mask for k, _, mask in segments]
    masks = [mask[None, None] if mask.dim() == 2 else mask for mask in masks]
    rows, queries = max(map(len, masks)), max(mask.size(2) for mask in masks)
    return k, v, torch.cat([mask.expand(rows, 1, queries, -1) for mask in masks], dim=3)


def beside(context: list[Segment], mask: Tensor | None) -> Look:
    """What tokens that are read together look at: the segments before them, and each other as the mask allows.

    It is given the tokens' own keys and values (B, H, T, D), and gives the segments for `attend`.
    """
    return lambda k, v: [*context, (k, v, mask)]


def causal_mask(T: int, like: Tensor) -> Tensor:
    """(T, T): token t may look at tokens 0..t. dtype and device of the tensor `like`."""
    return torch.full((T, T), float("-inf"), dtype=like.dtype, device=like.device).triu(1)


def real_tokens(lengths: Tensor, S: int) -> Tensor:
    """(B, S), true at the tokens of right-padded rows of `lengths` (B,)."""
    return torch.arange(S, device=lengths.device) < lengths[:, None]


def padding_mask(real: Tensor, like: Tensor) -> Tensor:
    """(B, 1, 1, S) from (B, S), true or 1 at the tokens: the padding is hidden. dtype and device of `like`."""
    pads = real.to(like.device) == 0
    return torch.zeros(pads.shape, dtype=like.dtype, device=like.device).masked_fill(pads, float("-inf"))[:, None, None]


def prefix_segments(prefix: PrefixDict | None, site: str, n_layer: int, like: Tensor) -> list[list[Segment]]:
    """What each layer sees of a prefix at one site: for each layer a list with one segment for `attend`, or none.

    prefix: None, or a dict site -> (L, 2, H, P, D) for the whole batch, or (L, 2, b, H, P, D) for b rows, or a
    PrefixStack.
    The segments have the dtype and device of the tensor `like`.
    """
    if prefix is None or prefix_length(prefix, site) == 0:
        return [[]] * n_layer
    kv, mask = prefix[site].to(like), None
    if kv.dim() == 5:
        kv = kv.unsqueeze(2)
    if isinstance(prefix, PrefixStack):
        lengths = prefix.lengths[site][prefix.rows]
        kv, mask = kv[:, :, prefix.rows], padding_mask(real_tokens(lengths, kv.size(-2)), like)
    return [[(k, v, mask)] for k, v in kv.unbind(0)]


def check_prefix(prefix: PrefixDict | None, sites: dict[str, tuple[int, int, int]], B: int) -> None:
    """InputError unless each tensor of a prefix is for one of the model's sites {site: (L, H, D)} and B rows."""
    if isinstance(prefix, FoldedInfix) and not hasattr(prefix, "source_lengths"):
        raise InputError("where do the sources end? a model takes infix.at(source_lengths), not the infix itself")
    for site, kv in (prefix or {}).items():
        if site not in sites:
            raise InputError(f"the prefix is for a site {site!r}, this model has {', '.join(sites)}")
        L, H, D = sites[site]
        rows = row_count(prefix, kv)
        if (kv.dim() not in (5, 6) or kv.shape[:2] != (L, 2) or (kv.size(-3), kv.size(-1)) != (H, D)
                or rows not in (1, B)):  # fmt: skip
            shape = f"({L}, 2, {H}, length, {D}), or ({L}, 2, {B}, {H}, length, {D}) for {B} rows"
            raise InputError(f"the prefix for {site!r} has shape {tuple(kv.shape)}, expected {shape}")


def row_count(prefix: PrefixDict | None, kv: Tensor) -> int:
    """How many rows a prefix's tensor kv is for, 1 for the whole batch."""
    if isinstance(prefix, PrefixStack):
        return len(prefix.rows)
    return kv.size(2) if kv.dim() == 6 else 1


def prefix_length(prefix: PrefixDict | None, site: str) -> int:
    """P, the number of virtual tokens at a site."""
    return 0 if prefix is None or site not in prefix else prefix[site].size(-2)


def first_position(prefix: PrefixDict | None) -> int | Tensor:
    """Position id of the (decoder's) first token: what the prefix was trained with, by default its length.

    Of a stack of prefixes (B,), one for each row, on the CPU.
    """
    if isinstance(prefix, PrefixStack):
        return prefix.position_offsets[prefix.rows]
    return prefix.position_offset if isinstance(prefix, FoldedPrefix) else prefix_length(prefix, "decoder")


def position_ids(ids: Tensor, start: int | Tensor, n_positions: int, lengths: Tensor | None = None) -> Tensor:
    """(T,) for tokens ids (B, T), the first at `start`, or (B, T) for starts (B,); InputError if they are too many.

    lengths (B,): how many tokens a row has before its padding, which may stand anywhere; None: T each.
    """
    T = ids.size(1)
    lengths = torch.tensor([T]) if lengths is None else lengths.cpu()
    end, row = (torch.as_tensor(start).cpu() + lengths).max(dim=0)
    if end > n_positions:
        count = int(lengths[row % len(lengths)])
        raise InputError(
            f"{count} tokens from position {end - count} on do not fit the model's {n_positions} positions: "
            "shorten the text (--max-source cuts sources) or the prefix"
        )
    positions = torch.arange(T, device=ids.device)
    positions = positions + (start.to(ids.device)[:, None] if torch.is_tensor(start) else start)
    return positions.clamp(max=n_positions - 1)  # that of padding alone


class Cache:
    """Keys and values of a generation under way: B examples, R = B * beams rows, the rows of an example adjacent.

    All rows of an example look at the same keys, as further queries; a mask says which of them each may see. So no key
    is ever copied or moved, whatever beams survive.

    own: per layer (k, v) (B, H, M, D) of self-attention: the prefix, GPT-2's source, then at each step a token of each
    row, `filled` in all; the other slots are room for more. None before the first.
    mask: (B, R/B, M), 0 or -inf: padding, other beams' tokens and empty slots are hidden.
    cross: per layer the segments of cross-attention, BART's prefix and source side by side; None for GPT-2.
    position: (R,) position ids of the next token.
    """

    def __init__(
        self, fixed: list[list[Segment]], cross: list[list[Segment]] | None, position: Tensor, dtype: torch.dtype
    ):
        """fixed, cross: per layer the segments that are there before the first step, on `position`'s device."""
        B = len(position)
        there = [join(segments, B) if segments else None for segments in fixed]
        self.own: list[KV | None] = [segment and segment[:2] for segment in there]
        first = there[0] if there else None  # the first layer's: all have its length and its mask
        keys, _, mask = first or (None, None, None)
        self.filled = 0 if keys is None else keys.size(2)
        self.mask = torch.zeros(B, 1, self.filled, dtype=dtype, device=position.device)
        if mask is not None:
            self.mask = self.mask + mask[:, 0]
        self.cross = cross and [[join(segments, B)] for segments in cross]
        self.position = position

    def open(self) -> None:
        """Begin a step: room for a token of each row, which none but its own row may see."""
        B, beams, M = self.mask.shape
        if M < self.filled + beams:
            more = self.mask.new_full((B, beams, ROOM + beams), float("-inf"))
            self.mask = torch.cat([self.mask, more], dim=2)
        own = torch.eye(beams, dtype=torch.bool, device=self.mask.device)
        self.mask[:, :, self.filled : self.filled + beams].masked_fill_(own, 0.0)

    def look(self, layer: int) -> Look:
        """As `beside`, for a step's tokens: the layer takes in their keys and values, then they look at all it has."""

        def look(k: Tensor, v: Tensor) -> list[Segment]:
            keys, values = self.own[layer] or (k[:, :, :0], v[:, :, :0])
            if lacking := self.mask.size(2) - keys.size(2):
                room = keys.new_zeros(*keys.shape[:2], lacking, keys.size(3))
                keys, values = torch.cat([keys, room], dim=2), torch.cat([values, room], dim=2)
            new = slice(self.filled, self.filled + k.size(2))
            keys[:, :, new], values[:, :, new] = k, v
            self.own[layer] = keys, values
            return [(keys, values, self.mask[:, None])]

        return look

    def close(self) -> None:
        """End a step: all layers have taken its tokens in."""
        self.filled, self.position = self.filled + self.mask.size(1), self.position + 1

    def select(self, rows: Tensor) -> None:
        """Go on from these rows (R',), still the same number for every example: surviving beams, or copies."""
        self.mask = self.mask.flatten(0, 1)[rows].unflatten(0, (len(self.mask), -1))
        self.position = self.position[rows]

    def keep(self, examples: Tensor) -> None:
        """Go on with these examples (B',) alone: the texts of the others are finished."""
        self.own = [kv and (kv[0][examples], kv[1][examples]) for kv in self.own]
        self.cross = self.cross and [
            [(k[examples], v[examples], mask if mask is None or len(mask) == 1 else mask[examples])]
            for ((k, v, mask),) in self.cross
        ]
        self.position = self.position.unflatten(0, (len(self.mask), -1))[examples].flatten()
        self.mask = self.mask[examples]
