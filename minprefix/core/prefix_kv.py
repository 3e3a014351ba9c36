"""What a model takes as its prefix: keys and values for each attention site, for all rows of a batch or for each.

Shapes: B rows, L layers, H heads, P prefix length, D head dimension.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from minprefix.core.attention import KV, length_mask, padding_mask
from minprefix.system.errors import InputError

PrefixDict = dict[str, Tensor]  # site -> (L, 2, H, P, D), or (L, 2, B, H, P, D) with a prefix for each row


class KVPrefix(dict[str, Tensor]):
    """Keys and values of a trained prefix: a dict site -> (L, 2, H, P, D), which knows where the tokens begin.

    position_offset: position id of the first real token. info: the metadata of the prefix file (base model, task).
    Change its tensors by `to` or `map`, which keep both; a dict comprehension gives a plain dict, for which a model
    takes its length as the offset.
    """

    method = "prefix"  # of train.py, as its files say

    def __init__(self, kv: PrefixDict, position_offset: int, info: dict[str, str] | None = None):
        super().__init__(kv)
        self.position_offset = position_offset
        self.info = info or {}

    def map(self, function: Callable[[Tensor], Tensor]) -> "KVPrefix":
        """The same prefix with each site's tensor replaced by function(tensor)."""
        result = copy.copy(self)
        for site, kv in self.items():
            result[site] = function(kv)
        return result

    def to(self, *args: Any, **kwargs: Any) -> "KVPrefix":
        """As `Tensor.to`: `prefix.to(device)`, `prefix.to(torch.bfloat16)`."""
        return self.map(lambda kv: kv.to(*args, **kwargs))

    def __copy__(self) -> "KVPrefix":
        result = type(self)(dict(self), self.position_offset, self.info)
        result.__dict__.update(self.__dict__)
        return result

    copy = __copy__


class KVInfix(KVPrefix):
    """A prefix between source and target: only the target's tokens see it, and their positions follow its own.

    `generate` takes it as it is; a model's `hidden_states` and `forward` take `with_source_lengths(lengths)`.
    """

    method = "infix"
    source_lengths: Tensor  # (B,), set by `with_source_lengths`

    def with_source_lengths(self, source_lengths: Tensor) -> "KVInfix":
        """The infix behind the first source_lengths (B,) tokens of the rows."""
        infix = copy.copy(self)
        infix.source_lengths = source_lengths
        return infix


class BatchedPrefix(dict[str, Tensor]):
    """Several prefixes for one batch: site -> (L, 2, N, H, P, D) for N of them, see `stack_prefixes` in prefix.py.

    lengths: site -> (N,), P is the longest. position_offsets: (N,). rows: (B,), which of the prefixes each row takes.
    """

    def __init__(self, kv: PrefixDict, lengths: dict[str, Tensor], position_offsets: Tensor, rows: Tensor):
        super().__init__(kv)
        self.lengths, self.position_offsets, self.rows = lengths, position_offsets, rows

    def to(self, *args: Any, **kwargs: Any) -> "BatchedPrefix":
        """As `Tensor.to`, for the keys and values."""
        kv = {site: tensor.to(*args, **kwargs) for site, tensor in self.items()}
        return BatchedPrefix(kv, self.lengths, self.position_offsets, self.rows)


def layer_prefixes(prefix: PrefixDict | None, site: str, n_layer: int, like: Tensor) -> list[KV | None]:
    """The keys and values that a prefix has at one site, layer by layer: (b, H, P, D), b = 1 or B; None without one.

    They get the dtype and device of the tensor `like`.
    """
    if prefix is None or prefix_length(prefix, site) == 0:
        return [None] * n_layer
    kv, mask = prefix[site].to(like), None
    if kv.dim() == 5:
        kv = kv.unsqueeze(2)
    if isinstance(prefix, BatchedPrefix):
        lengths = prefix.lengths[site][prefix.rows]
        kv, mask = kv[:, :, prefix.rows], padding_mask(length_mask(lengths, kv.size(-2)), like)
    return [KV(k, v, mask) for k, v in kv.unbind(0)]


def check_prefix(prefix: PrefixDict | None, sites: dict[str, tuple[int, int, int]], B: int) -> None:
    """InputError unless each tensor of a prefix is for one of the model's sites {site: (L, H, D)} and B rows."""
    if isinstance(prefix, KVInfix) and not hasattr(prefix, "source_lengths"):
        raise InputError("where do the sources end? give the model infix.with_source_lengths(lengths), not the infix")
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
    if isinstance(prefix, BatchedPrefix):
        return len(prefix.rows)
    return kv.size(2) if kv.dim() == 6 else 1


def prefix_length(prefix: PrefixDict | None, site: str) -> int:
    """P, the number of virtual tokens at a site."""
    return 0 if prefix is None or site not in prefix else prefix[site].size(-2)


def first_position(prefix: PrefixDict | None) -> int | Tensor:
    """Position id of the (decoder's) first token: what the prefix was trained with, by default its length.

    Of a stack of prefixes (B,), one for each row, on the CPU.
    """
    if isinstance(prefix, BatchedPrefix):
        return prefix.position_offsets[prefix.rows]
    return prefix.position_offset if isinstance(prefix, KVPrefix) else prefix_length(prefix, "decoder")
