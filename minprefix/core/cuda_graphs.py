"""CUDA graphs: the kernels of a training or decoding step, captured once and then launched together.

A GPU computes a small batch faster than the CPU can launch its kernels one by one. A captured graph always reads and
writes the same tensors, so each batch is copied into them. Batches are padded to few shapes, because each shape needs
its own graph. On other devices the same code runs without capturing, which the tests use.

Shapes: B rows, K beams of each, R = B * K, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from minprefix.core.batches import Batch
from minprefix.core.cache import Cache, StaticCache
from minprefix.core.loss import add_gradients, target_loss
from minprefix.core.model import Model

MAX_TOKENS = 2**15  # of a batch: larger ones keep a GPU busy, and a graph keeps its memory
MAX_GRAPHS = 128  # for training, one for each shape; E2E needs about 25
MIN_NEW_TOKENS = 8  # for fewer, capturing takes longer than it saves
T = TypeVar("T")


def on_cuda(model: Model) -> bool:
    return next(model.parameters()).is_cuda


def new_pool(device: torch.device) -> Any:
    """Memory for graphs of which only one runs at a time."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def capture(function: Callable[[], T], device: torch.device, pool: Any) -> Callable[[], T]:
    """A function that repeats the kernels which a call of `function` launches, and returns the same tensors each time.

    pool: see `new_pool`.
    """
    if device.type != "cuda":
        return function
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # torch.compile and the libraries set themselves up
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            result = function()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def training_graphs(model: Model, trainable: Any) -> "TrainingGraphs | None":
    """For a frozen model on CUDA, what computes the gradients of `trainable`; None for others.

    Fine-tuning would need the memory for its gradients twice.
    """
    frozen = not any(p.requires_grad for p in model.parameters())
    return TrainingGraphs(model, trainable) if frozen and on_cuda(model) else None


def decoding_graphs(model: Model, K: int, max_new_tokens: int) -> "DecodingGraphs | None":
    """For a model on CUDA, what decodes up to so many tokens by K beams; None for others, and for few tokens."""
    return DecodingGraphs(model, K, max_new_tokens) if on_cuda(model) and max_new_tokens >= MIN_NEW_TOKENS else None


class TrainingGraphs:
    """Loss and gradients of training batches, by one graph for each shape of a batch."""

    def __init__(self, model: Model, trainable: Any):
        self.model, self.trainable = model, trainable
        self.device = next(model.parameters()).device
        self.parameters = [p for p in trainable.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]  # written by every graph
        self.scale = torch.ones((), device=self.device)
        self.pool = new_pool(self.device)
        self.graphs: dict[Any, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def add_gradients(self, batch: Batch, scale: float) -> Tensor:
        """As loss.py's: add the gradients of scale * loss to the parameters' -> the loss, detached."""
        shapes = tuple(x.shape for x in batch.tensors())
        tokens = sum(x.numel() for x in batch.inputs[:2])
        if not batch.padded or tokens > MAX_TOKENS or (shapes not in self.graphs and len(self.graphs) == MAX_GRAPHS):
            return add_gradients(self.model, self.trainable, batch, scale)
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            if p.grad is gradient:  # of the step's last batch
                p.grad = gradient.clone()
        if shapes not in self.graphs:
            self.graphs[shapes] = self.capture(batch)
        inputs, replay = self.graphs[shapes]
        for mine, new in zip(inputs, batch.tensors(), strict=True):
            mine.copy_(new)
        self.scale.fill_(scale)
        loss = replay().clone()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        return loss

    def capture(self, batch: Batch) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """The tensors that a graph reads, and what replays it."""
        inputs = [x.clone() for x in batch.tensors()]
        mine = batch.with_tensors(inputs)

        def step() -> Tensor:
            loss = target_loss(self.model, mine, self.trainable())
            torch._foreach_copy_(self.gradients, torch.autograd.grad(loss * self.scale, self.parameters))
            return loss.detach()

        return inputs, capture(step, self.device, self.pool)


class DecodingGraph:
    """A decoding step over a static cache."""

    def __init__(self, model: Model, cache: Cache, K: int, max_new_tokens: int, pool: Any):
        """See `StaticCache`."""
        self.cache = StaticCache(cache, K, max_new_tokens + 2)  # capturing takes two steps
        self.ids = torch.zeros_like(self.cache.position)
        self.replay = capture(lambda: model.logits(model.step(self.ids, self.cache)), self.ids.device, pool)

    def step(self, ids: Tensor) -> Tensor:
        """As `model.step` and `model.logits`: ids (R,) -> logits (R, V), overwritten by the next step."""
        self.ids.copy_(ids)
        return self.replay()


class DecodingGraphs:
    """The graph of a search, captured again for a batch that does not fit, as the last, which may have fewer rows."""

    def __init__(self, model: Model, K: int, max_new_tokens: int):
        self.model, self.K, self.max_new_tokens = model, K, max_new_tokens
        self.pool = new_pool(next(model.parameters()).device)
        self.graph: DecodingGraph | None = None

    def load(self, cache: Cache) -> DecodingGraph:
        """A graph that goes on from a cache that was just filled by `prefill`."""
        if self.graph is None or not self.graph.cache.fits(cache):
            self.graph = None  # its memory is free before the next takes some
            self.graph = DecodingGraph(self.model, cache, self.K, self.max_new_tokens, self.pool)
        self.graph.cache.load(cache)
        return self.graph
