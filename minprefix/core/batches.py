"""Token ids as batches, for both kinds of model. Only the target's tokens are in the loss.

A row of a batch may hold several targets of one source, one behind the other, so that the model reads the source once.
Shapes: B rows, S source tokens, T tokens, N target tokens of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minprefix.core.attention import length_mask, round_up
from minprefix.core.encode import Pair, start_id
from minprefix.core.model import Model, Tokenizer

Group = tuple[list[int], list[list[int]]]  # the ids of a source, those of some of its targets: a row of a batch
IGNORE = -100  # a label that is not in the loss: padding
EVAL_GROUP = 8  # max targets per row in dev loss


@dataclass
class Batch:
    inputs: tuple[Any, ...]  # of model.hidden_states: GPT-2's (ids,), BART's (source_ids, target_ids, source_mask)
    target_positions: Tensor  # (N,) int64, b * T + t where the next token is in the target
    labels: Tensor  # (N,) int64, those next tokens, or IGNORE
    source_lengths: Tensor  # (B,) int64
    segments: Tensor | None = None  # (B, T) int64, see `attention.visible_keys`; None where each row has one target
    padded: bool = False  # to one of few shapes, see `collate`

    def tensors(self) -> list[Tensor]:
        tensors: list[Tensor] = [*self.inputs, self.target_positions, self.labels, self.source_lengths]
        return tensors if self.segments is None else [*tensors, self.segments]

    def to(self, device: str | torch.device) -> "Batch":
        return self.with_tensors([copy_to(x, device) for x in self.tensors()])

    def with_tensors(self, tensors: list[Tensor]) -> "Batch":
        """A batch of such `tensors()`."""
        n = len(self.inputs)
        positions, labels, lengths, *segments = tensors[n:]
        return Batch(tuple(tensors[:n]), positions, labels, lengths, segments[0] if segments else None, self.padded)


def copy_to(x: Tensor, device: str | torch.device) -> Tensor:
    """x on a device. From CPU to GPU: an asynchronous copy from pinned memory."""
    to_gpu = torch.device(device).type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if to_gpu else x.to(device)


def collate(groups: list[Group], tokenizer: Tokenizer, model: Model, pad_to: int = 1, pad_labels_to: int = 1) -> Batch:
    """B groups -> Batch, right-padded: GPT-2 rows hold source and targets, BART decoder rows the targets only.

    S and T are padded to a multiple of pad_to, N to one of pad_labels_to: so fewer shapes occur.
    """
    start, pad_id = start_id(model, tokenizer), tokenizer.pad_id
    rows, segments, labels = [], [], []
    for source, targets in groups:
        row = [] if model.encoder_decoder else list(source)
        segment = [0] * len(row)
        for number, target in enumerate(targets, 1):
            row += [start, *target[:-1]]
            segment += [number] * len(target)
            labels += target
        rows.append(row)
        segments.append(segment)
    inputs: tuple[Tensor, ...] = (pad(rows, pad_id, pad_to),)
    lengths = torch.tensor([len(source) for source, _ in groups])
    if model.encoder_decoder:
        source_ids = pad([source for source, _ in groups], pad_id, pad_to)
        inputs = (source_ids, *inputs, length_mask(lengths, source_ids.size(1)))
    padded = pad(segments, -1, pad_to)
    target_positions = (padded > 0).flatten().nonzero()[:, 0]
    if more := -len(labels) % pad_labels_to:
        labels += [IGNORE] * more
        any_will_do = torch.arange(more) % padded.numel()  # equal ones would be slower
        target_positions = torch.cat([target_positions, any_will_do])
    several = padded if pair_count(groups) > len(groups) else None
    return Batch(inputs, target_positions, torch.tensor(labels), lengths, several, padded=pad_to > 1)


def make_batch(groups: list[Group], tokenizer: Tokenizer, model: Model, start: int) -> Batch:
    """A batch for `training_step`, on the model's device, padded to one of few shapes where the positions suffice.

    Few shapes are few CUDA graphs; on a CPU, for which oneDNN prepares each shape once, they save time and memory.
    start: the position of the (decoder's) first token.
    """
    device = model.head.weight.device
    pad_to, pad_labels_to = {"cpu": (4, 16), "cuda": (8, 8 * len(groups))}.get(device.type, (1, 1))
    if not padding_fits(groups, model, start, pad_to):
        pad_to, pad_labels_to = 1, 1
    return collate(groups, tokenizer, model, pad_to, pad_labels_to).to(device)


def padding_fits(groups: list[Group], model: Model, start: int, pad_to: int) -> bool:
    """Whether rows padded to a multiple of pad_to fit into the model's positions, of which the first token has `start`.

    For BART that is the decoder's.
    """
    rows = [(len(source), sum(map(len, targets))) for source, targets in groups]
    if model.encoder_decoder:
        longest = [(max(S for S, _ in rows), 0), (max(T for _, T in rows), start)]
    else:
        longest = [(max(S + T for S, T in rows), start)]
    return all(round_up(n, pad_to) + first <= model.n_positions for n, first in longest)


def pair_count(groups: list[Group]) -> int:
    return sum(len(targets) for _, targets in groups)


def target_tokens(groups: list[Group]) -> int:
    return sum(len(target) for _, targets in groups for target in targets)


def loss_scale(model: Model, groups: list[Group]) -> float:
    """What a batch's summed loss is multiplied by in training: 1 / its pairs, or for BART 1 / its target tokens."""
    return 1 / (target_tokens(groups) if model.encoder_decoder else pair_count(groups))


def pad(rows: list[list[int]], value: int, multiple: int = 1) -> Tensor:
    """Lists of ids -> (B, T) int64, filled up on the right; T is a multiple of `multiple`."""
    T = round_up(max(len(row) for row in rows), multiple)
    return torch.tensor([[*row, *[value] * (T - len(row))] for row in rows])


def batches_per_epoch(pairs: Sequence[Any], batch_size: int) -> int:
    """How many `epoch_batches` are made of pairs: all full but one."""
    return math.ceil(len(pairs) / batch_size)


def group_sizes(batch_size: int, group: int) -> list[int]:
    """How many targets a group may hold: the divisors of batch_size up to `group`, the largest first.

    So all groups of a batch can hold equally many, and need little padding.
    """
    return [size for size in range(min(group, batch_size), 0, -1) if batch_size % size == 0]


def pairs_by_source(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs of each source, the sources in the order in which they come first."""
    same: dict[tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        same.setdefault(tuple(pair[0]), []).append(pair)
    return list(same.values())


def cut_groups(by_source: list[list[Pair]], sizes: list[int], seed: int, epoch: int) -> list[Group]:
    """The targets of each source in random order, cut into as few groups of these sizes (descending) as they take."""
    rng = np.random.default_rng([seed, epoch, 1])  # another order than that of `epoch_batches`
    groups = []
    for pairs in by_source:
        targets = [pairs[i][1] for i in rng.permutation(len(pairs))] if len(pairs) > 1 else [pairs[0][1]]
        while targets:
            size = next(size for size in sizes if size <= len(targets))
            groups.append((pairs[0][0], targets[:size]))
            targets = targets[size:]
    return groups


def group_lengths(groups: list[Group], encoder_decoder: bool) -> np.ndarray:
    """(N,), the tokens of each group; for BART, which pads sources and targets separately, (N, 2), those of both."""
    lengths = np.array([(len(source), sum(map(len, targets))) for source, targets in groups]).reshape(-1, 2)
    return lengths if encoder_decoder else lengths.sum(axis=1)


def epoch_batches(
    groups: list[Group], batch_size: int, seed: int, epoch: int, encoder_decoder: bool = False
) -> list[list[Group]]:
    """One epoch's batches: each group once, batch_size pairs in all batches but one, which may have fewer.

    The groups of a batch are of one size and like lengths. Only what is left over, less than a batch of each size, is
    batched together, some of its groups being cut in two.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths, sizes = group_lengths(groups, encoder_decoder), np.array([len(targets) for _, targets in groups])
    batches: list[list[Group]] = []
    left_over: list[Group] = []
    for size in np.unique(sizes)[::-1]:
        same = np.flatnonzero(sizes == size)
        rows = batch_size // size
        for picked in length_buckets(lengths[same], rows, rng):
            batch = [groups[i] for i in same[picked]]
            if len(picked) == rows:
                batches.append(batch)
            else:
                left_over += batch
    batches += fill_batches(left_over, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def length_buckets(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of group indices: each once, groups of like lengths together, all batches full but the last.

    lengths: those of the groups, see `group_lengths`. batch_size: groups in a batch.
    The groups are shuffled, cut into windows of up to 50 batches, and sorted by length inside each. There are at least
    four windows if there are enough groups: with a single one, sorted as a whole, the same groups would nearly always
    share a batch.
    """
    order = rng.permutation(len(lengths))
    window = batch_size * min(max(len(lengths) // batch_size // 4, 1), 50)
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[by_length(lengths[part], batch_size)]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return batches


def by_length(lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """The order (N,) in which neighbouring groups have like lengths. lengths: as in `length_buckets`."""
    if lengths.ndim == 1:
        return np.argsort(lengths, kind="stable")
    order = np.argsort(lengths[:, 0], kind="stable")
    group = batch_size * max(1, round(math.sqrt(len(order) / batch_size)))  # alike in the first length
    groups = [order[i : i + group] for i in range(0, len(order), group)]
    return np.concatenate([rows[np.argsort(lengths[rows, 1], kind="stable")] for rows in groups])


def fill_batches(groups: list[Group], batch_size: int) -> list[list[Group]]:
    """Groups in order -> batches of batch_size pairs, all full but the last: where one ends a group is cut in two."""
    batches: list[list[Group]] = []
    room = 0
    for source, targets in groups:
        while targets:
            if room == 0:
                batches.append([])
                room = batch_size
            batches[-1].append((source, targets[:room]))
            targets, room = targets[room:], max(0, room - len(targets))
    return batches


def split_groups(groups: list[Group], parts: int) -> list[list[Group]]:
    """Groups in so many parts of about equally many pairs."""
    split: list[list[Group]] = [[] for _ in range(parts)]
    for group in sorted(groups, key=lambda group: -len(group[1])):
        min(split, key=pair_count).append(group)
    return split


def eval_batches(pairs: list[Pair], batch_size: int) -> list[list[Group]]:
    """Batches for evaluation: each pair once, a source's targets together, and the longest groups first.

    So too little memory shows at once. A batch has at most batch_size pairs, or a single group.
    """
    groups = [
        (same[0][0], [target for _, target in same[i : i + EVAL_GROUP]])
        for same in pairs_by_source(pairs)
        for i in range(0, len(same), EVAL_GROUP)
    ]
    batches: list[list[Group]] = []
    room = 0
    for i in np.argsort(-group_lengths(groups, False), kind="stable"):
        count = len(groups[i][1])
        if count > room:
            batches.append([])
            room = batch_size
        batches[-1].append(groups[i])
        room -= count
    return batches
