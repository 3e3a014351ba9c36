"""What a model takes as its prefix: keys and values for each attention site, for all rows of a batch or for each.

Shapes: B rows, L layers, H heads, P prefix length, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from minprefix.core.attention import KV, length_mask, padding_mask
from minprefix.system.errors import InputError

Self = TypeVar("Self", bound="KVPrefix")


@dataclass
class KVPrefix:
    """A trained prefix: its keys and values, and the position at which the tokens after it begin.

    kv: site -> (L, 2, H, P, D), or (L, 2, B, H, P, D) with a prefix for each row. position_offset: position id of the
    first real token, stored here because a prefix works only with the positions that it was trained with. info: the
    metadata of the prefix file (base model, task). `prefix[site]` is short for `prefix.kv[site]`.
    """

    kv: dict[str, Tensor]
    position_offset: int
    info: dict[str, str] = field(default_factory=dict)

    method = "prefix"  # the --method in the file's metadata

    __iter__ = None  # iterating would drop the offset: use `map`

    def __getitem__(self, site: str) -> Tensor:
        return self.kv[site]

    def map(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same prefix with each site's tensor replaced by function(tensor)."""
        return replace(self, kv={site: function(kv) for site, kv in self.kv.items()})

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`: `prefix.to(device)`, `prefix.to(torch.bfloat16)`."""
        return self.map(lambda kv: kv.to(*args, **kwargs))


@dataclass
class KVInfix(KVPrefix):
    """A prefix between source and target: only target tokens see it; their positions start after source + infix.

    source_lengths: (B,), the tokens of each row that stand before it. `generate` sets them; for a model's `forward`
    and `hidden_states` call `with_source_lengths`.
    """

    source_lengths: Tensor | None = None

    method = "infix"

    def with_source_lengths(self, source_lengths: Tensor) -> "KVInfix":
        """The infix behind the first source_lengths (B,) tokens of the rows."""
        return replace(self, source_lengths=source_lengths)


@dataclass
class BatchedPrefix:
    """Several prefixes for one batch, see `stack_prefixes` in prefix.py.

    kv: site -> (L, 2, N, H, P, D) for N prefixes, P being the longest. lengths: site -> (N,). position_offsets: (N,).
    rows: (B,), which of the prefixes each row takes.
    """

    kv: dict[str, Tensor]
    lengths: dict[str, Tensor]
    position_offsets: Tensor
    rows: Tensor

    def to(self, *args: Any, **kwargs: Any) -> "BatchedPrefix":
        """As `Tensor.to`, for the keys and values."""
        return replace(self, kv={site: kv.to(*args, **kwargs) for site, kv in self.kv.items()})


AnyPrefix = KVPrefix | BatchedPrefix | dict[str, Tensor]  # a dict as in KVPrefix.kv; its text starts at position P


def tensors_of(prefix: AnyPrefix | None) -> dict[str, Tensor]:
    """site -> tensor, of whatever a model takes as its prefix."""
    if prefix is None:
        return {}
    if not isinstance(prefix, (dict, KVPrefix, BatchedPrefix)):
        raise InputError(f"the prefix is a {type(prefix).__name__}: give what calling it returns, or its fold()")
    return prefix if isinstance(prefix, dict) else prefix.kv


def prefix_like(prefix: AnyPrefix | None, like: Tensor) -> AnyPrefix | None:
    """The prefix with the dtype and device of the tensor `like`."""
    if isinstance(prefix, dict):
        return {site: kv.to(like) for site, kv in prefix.items()}
    return prefix if prefix is None else prefix.to(like)


def layer_prefixes(prefix: AnyPrefix | None, site: str, n_layer: int, like: Tensor) -> list[KV | None]:
    """The keys and values that a prefix has at one site, layer by layer: (b, H, P, D), b = 1 or B; None without one.

    They get the dtype and device of the tensor `like`.
    """
    if prefix_length(prefix, site) == 0:
        return [None] * n_layer
    kv, mask = tensors_of(prefix)[site].to(like), None
    if kv.dim() == 5:
        kv = kv.unsqueeze(2)
    if isinstance(prefix, BatchedPrefix):
        lengths = prefix.lengths[site][prefix.rows]
        kv, mask = kv[:, :, prefix.rows], padding_mask(length_mask(lengths, kv.size(-2)), like)
    return [KV(k, v, mask) for k, v in kv.unbind(0)]


def check_prefix(prefix: AnyPrefix | None, sites: dict[str, tuple[int, int, int]], B: int) -> None:
    """InputError unless each tensor of a prefix is for one of the model's sites {site: (L, H, D)} and B rows."""
    if isinstance(prefix, KVInfix) and prefix.source_lengths is None:
        raise InputError("where do the sources end? give the model infix.with_source_lengths(lengths), not the infix")
    for site, kv in tensors_of(prefix).items():
        if site not in sites:
            raise InputError(f"the prefix is for a site {site!r}, this model has {', '.join(sites)}")
        L, H, D = sites[site]
        rows = row_count(prefix, kv)
        if (kv.dim() not in (5, 6) or kv.shape[:2] != (L, 2) or (kv.size(-3), kv.size(-1)) != (H, D)
                or rows not in (1, B)):  # fmt: skip
            shape = f"({L}, 2, {H}, length, {D}), or ({L}, 2, {B}, {H}, length, {D}) for {B} rows"
            raise InputError(f"the prefix for {site!r} has shape {tuple(kv.shape)}, expected {shape}")


def row_count(prefix: AnyPrefix | None, kv: Tensor) -> int:
    """How many rows a prefix's tensor kv is for, 1 for the whole batch."""
    if isinstance(prefix, BatchedPrefix):
        return len(prefix.rows)
    return kv.size(2) if kv.dim() == 6 else 1


def select_rows(prefix: AnyPrefix | None, rows: list[int]) -> AnyPrefix | None:
    """The prefix for these rows (B',) of a batch; what all rows share stays as it is."""
    if isinstance(prefix, BatchedPrefix):
        return prefix if len(prefix.rows) == 1 else replace(prefix, rows=prefix.rows[rows])
    kv = {site: kv[:, :, rows] if row_count(prefix, kv) > 1 else kv for site, kv in tensors_of(prefix).items()}
    return replace(prefix, kv=kv) if isinstance(prefix, KVPrefix) else kv


def prefix_length(prefix: AnyPrefix | None, site: str) -> int:
    """P, the number of virtual tokens at a site."""
    kv = tensors_of(prefix).get(site)
    return 0 if kv is None else kv.size(-2)


def first_position(prefix: AnyPrefix | None) -> int | Tensor:
    """Position id of the (decoder's) first token: what the prefix was trained with, by default its length.

    For a stack: (B,), on the CPU.
    """
    if isinstance(prefix, BatchedPrefix):
        return prefix.position_offsets[prefix.rows]
    return prefix.position_offset if isinstance(prefix, KVPrefix) else prefix_length(prefix, "decoder")
