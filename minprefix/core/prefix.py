"""The trainable prefix (Li & Liang 2021, section 4): keys and values of P virtual tokens for every attention layer.

Shapes: P prefix length, L layers, H heads, D head dimension, C = H * D model dimension.
"""

from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minprefix.core.model import Model, Tokenizer
from minprefix.core.prefix_kv import BatchedPrefix, KVInfix, KVPrefix, first_position, tensors_of
from minprefix.system.errors import InputError


def stack_prefixes(prefixes: list[KVPrefix], rows: list[int]) -> BatchedPrefix:
    """Several prefixes for one batch, in which row i uses prefixes[rows[i]] (paper, section 8).

    The result goes to a model or to `generate` as their `prefix`. The prefixes may have different lengths, sites and
    position offsets. Each is stored once: (L, 2, N, H, P, D) for N prefixes at each site, padded to the longest; the
    padding is masked.
    """
    if not prefixes or not all(0 <= row < len(prefixes) for row in rows):
        raise InputError(f"the rows name prefixes {sorted(set(rows))}, there are {len(prefixes)}, the first is 0")
    if any(isinstance(prefix, KVInfix) for prefix in prefixes):
        raise InputError("an infix cannot be stacked: it stands behind the source of each row, a prefix before it")
    stack, stacked_lengths = {}, {}
    for site in {site: None for prefix in prefixes for site in prefix.kv}:
        parts = [prefix.kv.get(site) for prefix in prefixes]
        some = next(kv for kv in parts if kv is not None)
        parts = [some[:, :, :, :0] if kv is None else kv.to(some.device) for kv in parts]
        shapes = {(*kv.shape[:3], *kv.shape[4:]) for kv in parts}
        if len(shapes) > 1:
            raise InputError(f"the prefixes' {site!r} parts are of different models: {' and '.join(map(str, shapes))}")
        lengths = [kv.size(3) for kv in parts]
        stack[site] = torch.stack([F.pad(kv, (0, 0, 0, max(lengths) - kv.size(3))) for kv in parts], dim=2)
        stacked_lengths[site] = torch.tensor(lengths)
    offsets = torch.tensor([first_position(prefix) for prefix in prefixes])
    return BatchedPrefix(stack, stacked_lengths, offsets, torch.tensor(rows, dtype=torch.long))


class Prefix(nn.Module):
    """A trainable prefix. Calling it returns its keys and values as a KVPrefix, for the model's `prefix` argument.

    mlp_width: width of the MLP that computes them (paper section 4.3: 512 for table-to-text, 800 for summarisation); 0
    for no MLP: the keys and values themselves are the parameters, which training optimises with Muon.
    position_offset: position id of the (decoder's) first token, by default the length of the prefix before it.
    sites: a subset of the model's attention sites, by default all of them.
    The parameters are float32, whatever the model's dtype.
    """

    kind: type[KVPrefix] = KVPrefix  # what calling it returns

    def __init__(
        self, model: Model, length: int, mlp_width: int = 512, position_offset: int | None = None,
        sites: str | list[str] | None = None,
    ):  # fmt: skip
        super().__init__()
        sites = list(model.prefix_sites) if sites is None else [sites] if isinstance(sites, str) else sites
        if not sites:
            raise InputError(f"a prefix needs at least one of the model's sites: {', '.join(model.prefix_sites)}")
        if unknown := set(sites) - set(model.prefix_sites):
            raise InputError(f"the model has no prefix site {min(unknown)!r}, only {', '.join(model.prefix_sites)}")
        if length < 1 or mlp_width < 0:
            raise InputError(f"prefix length {length} must be at least 1, MLP width {mlp_width} at least 0")
        self.length, self.mlp_width = length, mlp_width
        default = length if "decoder" in sites else 0  # nothing stands before the decoder's tokens then
        self.position_offset = default if position_offset is None else position_offset
        self.sites = nn.ModuleDict(
            {
                site: MLPReparam(*shape, length, mlp_width) if mlp_width else DirectKV(*shape, length)
                for site, shape in model.prefix_sites.items()
                if site in sites
            }
        ).to(next(model.parameters()).device)

    def forward(self) -> KVPrefix:
        return self.kind({site: part() for site, part in self.sites.items()}, self.position_offset)

    @torch.no_grad()
    def fold(self, info: dict[str, str] | None = None) -> KVPrefix:
        """The keys and values without the MLP: all that inference needs, and what is saved. info: see `KVPrefix`."""
        return self.kind({site: part().clone() for site, part in self.sites.items()}, self.position_offset, info or {})

    def init_from_words(self, model: Model, tokenizer: Tokenizer, words: str) -> None:
        """Start from the activations of real words (paper section 7.4), repeated or cut to the prefix length."""
        ids = tokenizer.encode(words)
        if not ids:
            raise InputError(f"the words {words!r} to start the prefix from hold no token")
        activations = word_activations(model, list(islice(cycle(ids), self.length)))
        self.init_from(KVPrefix(activations, self.position_offset))

    def init_from(self, prefix: KVPrefix) -> None:
        """Start from the keys and values of a prefix of the same shape, with its position offset; an MLP is fitted."""
        for site, part in self.sites.items():
            if site not in prefix.kv or prefix[site].shape != part().shape:
                given = {site: tuple(kv.shape) for site, kv in prefix.kv.items()}
                raise InputError(f"the prefix to start from is {given}, for {site!r} {tuple(part().shape)} is needed")
        self.position_offset = prefix.position_offset
        for site, part in self.sites.items():
            part.fit(prefix[site].float())


class DirectKV(nn.Module):
    """The keys and values of one site as parameters."""

    def __init__(self, L: int, H: int, D: int, length: int):
        super().__init__()
        self.kv = nn.Parameter(torch.randn(L, 2, H, length, D))

    def forward(self) -> Tensor:
        return self.kv

    @torch.no_grad()
    def fit(self, kv: Tensor) -> None:
        self.kv.copy_(kv)


class MLPReparam(nn.Module):
    """The keys and values of one site, computed by an MLP from an embedding (P, C) -> (L, 2, H, P, D)."""

    def __init__(self, L: int, H: int, D: int, length: int, mlp_width: int):
        super().__init__()
        self.shape = (length, L, 2, H, D)
        self.embedding = nn.Parameter(torch.randn(length, H * D))
        self.mlp = nn.Sequential(nn.Linear(H * D, mlp_width), nn.Tanh(), nn.Linear(mlp_width, L * 2 * H * D))

    def forward(self) -> Tensor:
        return self.mlp(self.embedding).view(self.shape).permute(1, 2, 3, 0, 4)

    def fit(self, kv: Tensor) -> None:
        """Fit the MLP's output to kv (L, 2, H, P, D) by mean squared error, as the authors' code does."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-4)
        for _ in range(500):
            F.mse_loss(self(), kv).backward()
            optimizer.step()
            optimizer.zero_grad()  # last, so that no gradient is left for the training that follows


@torch.no_grad()
def word_activations(model: Model, ids: list[int]) -> dict[str, Tensor]:
    """The keys and values that the frozen model computes for some tokens: site -> (L, 2, H, len(ids), D)."""
    ids = torch.tensor([ids], device=next(model.parameters()).device)
    activations = model.activations(ids)
    return {site: torch.stack([layer.stacked()[:, 0] for layer in kv]) for site, kv in activations.items()}


def count_parameters(trainable: nn.Module, model: nn.Module) -> list[int]:
    """The number of parameters of a method that are trained, of those that are saved, and of the model's."""
    counted = trainable.parameters(), tensors_of(trainable.fold()).values(), model.parameters()
    return [sum(tensor.numel() for tensor in tensors) for tensors in counted]


def fingerprint(model: nn.Module) -> list[float]:
    """The norms of the first eight rows of each parameter: they identify the weights, in whichever dtype."""
    return [float(f"{p[:8].float().norm().item():.4g}") for p in model.parameters()]
