"""CUDA graphs: the kernels of a training or decoding step, recorded once and then launched all together.

A GPU computes a small batch faster than the CPU can launch its kernels one by one. A recorded step reads and writes the
same tensors each time; so inputs are copied into those, and padded to few sizes, since each needs a recording.
On other devices the same code runs without a recording, which the tests use.

Shapes: B rows, K beams of each, T tokens, V vocabulary.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from minprefix.core.batches import Batch, Group
from minprefix.core.cache import Cache, FixedCache
from minprefix.core.loss import add_gradients, target_loss
from minprefix.core.model import Model
from minprefix.system.errors import out_of_memory

PAD_TO = 8  # batches are padded to a multiple of so many tokens
MOST_TOKENS = 2**15  # of a batch; the memory of a recording is not given back, and a larger batch keeps a GPU busy
FEWEST_TOKENS = 8  # to be written; for fewer, recording a step takes longer than it saves
MAX_RECORDINGS = 128  # of training batches, one for each padded shape
T = TypeVar("T")


def uses_graphs(model: Model) -> bool:
    return next(model.parameters()).is_cuda


def record(function: Callable[[], T], device: torch.device, pool: Any) -> Callable[[], T]:
    """What repeats the kernels that a call of `function` launches; it returns the same tensors each time.

    pool: memory that recordings share, of which only one at a time is in use.
    """
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):  # torch.compile and the libraries set themselves up
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            result = function()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        print(f"CUDA graphs do not work here, so this is slower ({reason:.200})", file=sys.stderr)
        return function

    def replay() -> T:
        graph.replay()
        return result

    return replay


def training_graphs(model: Model, trainable: Any) -> "TrainingGraphs | None":
    """For a model on CUDA, what records the gradients of its training batches."""
    return TrainingGraphs(model, trainable) if uses_graphs(model) else None


def decoding_graphs(model: Model, K: int, new_tokens: int) -> "DecodingGraphs | None":
    """For a model on CUDA, what records its decoding steps, of K beams that get up to so many tokens."""
    return DecodingGraphs(model, K, new_tokens) if uses_graphs(model) and new_tokens >= FEWEST_TOKENS else None


class TrainingGraphs:
    """Loss and gradients of training batches, recorded once for each shape of a batch."""

    def __init__(self, model: Model, trainable: Any):
        self.model, self.trainable = model, trainable
        self.device = next(model.parameters()).device
        self.parameters = [p for p in trainable.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]  # to which every recording adds its own
        self.scale = torch.ones((), device=self.device)
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.most_tokens = MOST_TOKENS
        self.recordings: dict[Any, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def pad_to(self, groups: list[Group]) -> int:
        """What `collate` is to pad these groups to a multiple of: PAD_TO, or 1 for a batch too large to be recorded."""
        longest = max(len(source) + sum(map(len, targets)) for source, targets in groups) + PAD_TO
        fits = longest + self.trainable.position_offset <= self.model.n_positions
        return PAD_TO if fits and len(groups) * longest <= self.most_tokens else 1

    def add_gradients(self, batch: Batch, scale: float) -> Tensor:
        """As loss.py's: add the gradients of scale * loss to the parameters' -> the loss, detached."""
        shapes = tuple(x.shape for x in batch.tensors())
        if shapes not in self.recordings:
            large = sum(x.numel() for x in batch.inputs) > self.most_tokens
            if large or len(self.recordings) == MAX_RECORDINGS:
                return add_gradients(self.model, self.trainable, batch, scale)
            self.recordings[shapes] = self.record(batch)
        inputs, replay = self.recordings[shapes]
        if self.parameters[0].grad is None:
            torch._foreach_zero_(self.gradients)
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            if p.grad is not gradient:
                p.grad = gradient if p.grad is None else gradient.copy_(p.grad)
        for mine, new in zip(inputs, batch.tensors(), strict=True):
            mine.copy_(new)
        self.scale.fill_(scale)
        return replay().clone()

    def record(self, batch: Batch) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """The tensors that a recording reads, and what repeats it."""
        inputs = [x.clone() for x in batch.tensors()]
        mine = batch.with_tensors(inputs)

        def step() -> Tensor:
            loss = target_loss(self.model, mine, self.trainable())
            torch._foreach_add_(self.gradients, torch.autograd.grad(loss * self.scale, self.parameters))
            return loss.detach()

        gradients = [gradient.clone() for gradient in self.gradients]
        replay = record(step, self.device, self.pool)
        torch._foreach_copy_(self.gradients, gradients)  # recording ran the step
        return inputs, replay


class DecodingGraph:
    """A decoding step of batches that fit into one cache of fixed size."""

    def __init__(self, model: Model, cache: Cache, K: int, room: int, pool: Any):
        """See `FixedCache`."""
        self.cache = FixedCache(cache, K, room + 2)  # recording takes two steps
        self.ids = torch.zeros_like(self.cache.position)
        self.replay = record(lambda: model.logits(model.step(self.ids, self.cache)), self.ids.device, pool)

    def step(self, ids: Tensor) -> Tensor:
        """As `model.step` and `model.logits`: ids (R,) -> logits (R, V), overwritten by the next step."""
        self.ids.copy_(ids)
        return self.replay()


class DecodingGraphs:
    """The graphs of one search, whose batches are alike."""

    def __init__(self, model: Model, K: int, room: int):
        """room: how many tokens each of the K beams can get."""
        device = next(model.parameters()).device
        self.model, self.K, self.room, self.graphs = model, K, room, list[DecodingGraph]()
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def load(self, cache: Cache) -> DecodingGraph:
        """A graph that goes on from a cache that was just filled by `prefill`."""
        graph = next((graph for graph in self.graphs if graph.cache.fits(cache, self.K)), None)
        if graph is None:
            self.graphs.append(graph := DecodingGraph(self.model, cache, self.K, self.room, self.pool))
        graph.cache.load(cache)
        return graph
