"""The optimisation loop: steps, dev loss, checkpoints that a killed run resumes from, a log."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from minprefix.core.batches import (
    Batch,
    Group,
    batches_per_epoch,
    collate,
    cut_groups,
    epoch_batches,
    eval_batches,
    group_sizes,
    loss_scale,
    make_batch,
    pair_count,
    pairs_by_source,
    split_groups,
    target_tokens,
)
from minprefix.core.checkpointing import Log, read_checkpoint, save_checkpoint, too_little_memory
from minprefix.core.cuda_graphs import TrainingGraphs, training_graphs
from minprefix.core.encode import Pair
from minprefix.core.kernels import compiled_layers, packed_weights
from minprefix.core.loss import add_gradients, target_loss
from minprefix.core.model import Model, Tokenizer
from minprefix.core.muon import Muon
from minprefix.core.prefix import Prefix, fingerprint
from minprefix.system import distributed, signals
from minprefix.system.errors import InputError, out_of_memory
from minprefix.system.files import write_jsonl

Method = Any  # a Prefix, or another module of methods/ whose call gives the prefix that the model takes
DIVERGED = "the loss became"  # experiments.py searches for this text
EVAL_PAIRS = {"cuda": 64}  # pairs in a batch of the dev loss, if training has fewer: small ones leave a GPU idle
NO_SUMS: dict[str, float] = {"loss": 0.0, "tokens": 0, "examples": 0, "seconds": 0.0}


def make_optimizer(trainable: Method, lr: float) -> Optimizer:
    """Muon for keys and values that are trained directly, AdamW, as the paper, for all else."""
    if isinstance(trainable, Prefix) and trainable.mlp_width == 0:
        return Muon(trainable.parameters(), lr)
    return torch.optim.AdamW(trainable.parameters(), lr=lr, weight_decay=0.0, fused=True)


def training_step(
    model: Model, trainable: Method, batches: list[Batch], optimizer: Optimizer, scale: float,
    graphs: TrainingGraphs | None = None,
) -> Tensor:  # fmt: skip
    """One optimiser step -> the `target_loss` of the global batch, detached.

    batches: this rank's micro-batches. scale: `loss_scale` of the global batch; 0 for a rank that has no share of it.
    """
    add = graphs.add_gradients if graphs else functools.partial(add_gradients, model, trainable)
    loss = torch.stack([add(batch, scale) for batch in batches]).sum()
    loss = loss if scale else torch.zeros_like(loss)
    distributed.all_reduce_sum([*(p.grad for p in trainable.parameters() if p.grad is not None), loss])
    torch.nn.utils.clip_grad_norm_(trainable.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


@torch.no_grad()
def dev_loss(model: Model, trainable: Method, pairs: list[Pair], tokenizer: Tokenizer, batch_size: int) -> float:
    """Nats per target token over (source, target) pairs; the model reads a source once for several targets."""
    device = next(model.parameters()).device
    prefix, total = trainable(), torch.zeros((), device=device)
    batch_size = max(batch_size, EVAL_PAIRS.get(device.type, 1))
    for groups in distributed.shard(eval_batches(pairs, batch_size)):
        batch = collate(groups, tokenizer, model).to(device)
        total = total + target_loss(model, batch, prefix)
    distributed.all_reduce_sum([total])
    return float(total) / sum(len(target) for _, target in pairs)


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate for a step: linear warm-up, then linear decay to zero."""
    return min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def batch_stream(
    pairs: list[Pair], batch_size: int, seed: int, start: int, encoder_decoder: bool = False, group: int = 1,
    parts: int = 1,
) -> Iterator[list[Group]]:  # fmt: skip
    """Batches of batch_size pairs from step `start` on, epoch after epoch, the same for the same seed.

    encoder_decoder: whether they are for a BART, which pads sources and targets apart. group: how many of a source's
    targets may share a row, see `group_sizes`; which of them do changes from epoch to epoch. parts: how many batches
    a step's batch is split into afterwards, which no row may exceed.
    """
    sizes, per_epoch = group_sizes(batch_size // parts, group), batches_per_epoch(pairs, batch_size)
    by_source = [[pair] for pair in pairs] if sizes == [1] else pairs_by_source(pairs)
    for epoch in itertools.count(start // per_epoch):
        groups = cut_groups(by_source, sizes, seed, epoch)
        yield from epoch_batches(groups, batch_size, seed, epoch, encoder_decoder)[start % per_epoch :]
        start = 0


class Run:
    """A run of `train`: what it trains on what, how far it has come, what it writes to OUT.

    settings: must be equal on resume. With `resume` it starts where OUT/checkpoint.pt has it.
    """

    def __init__(
        self, model: Model, trainable: Method, tokenizer: Tokenizer, train_pairs: list[Pair], dev_pairs: list[Pair],
        out: Path, settings: dict[str, Any], resume: bool,
    ) -> None:  # fmt: skip
        self.model, self.trainable, self.tokenizer, self.out, self.settings = model, trainable, tokenizer, out, settings
        self.train_pairs, self.dev_pairs = train_pairs, dev_pairs
        self.steps, self.batch_size, self.lr = (settings[key] for key in ("steps", "batch_size", "lr"))
        self.accumulate = settings["accumulate"]
        self.step_size = self.batch_size * self.accumulate  # pairs
        self.optimizer = make_optimizer(trainable, self.lr)
        self.schedule = LambdaLR(
            self.optimizer, lambda step: linear_schedule(step, settings["steps"], settings["warmup"])
        )
        self.graphs = training_graphs(model, trainable)
        self.step = 0
        self.log: Log = []
        self.best: Any = None  # dev_loss, step and weights
        self.sums = dict(NO_SUMS)  # since the last row of the log
        if resume and (out / "checkpoint.pt").exists():
            self.resume_from(out / "checkpoint.pt")
        self.losses: list[Tensor] = []  # of the last steps, still on the device
        self.since = time.perf_counter()  # when the first of them began
        self.bar = tqdm(total=self.steps, initial=self.step, desc="training", unit="step", dynamic_ncols=True,
                        disable=distributed.rank() > 0)  # fmt: skip

    def eval_due(self) -> bool:
        """Whether a dev loss is due and not yet evaluated."""
        due = self.step % self.settings["eval_every"] == 0 or self.step == self.steps
        return due and (not self.log or self.log[-1]["step"] < self.step)

    def batches(self, start: int) -> Iterator[list[Group]]:
        """The batches from step `start` on."""
        seed, group = self.settings["seed"], self.settings["group"]
        apart = self.model.encoder_decoder
        return batch_stream(self.train_pairs, self.step_size, seed, start, apart, group, self.accumulate)

    def train_step(self, groups: list[Group]) -> None:
        """One step on a global batch, of whose groups this rank takes its share."""
        mine = distributed.shard(groups)
        parts = [part for part in split_groups(mine, self.accumulate) if part]
        # A rank without a share takes one group, of weight 0: `all_reduce_sum` needs a gradient of every rank.
        parts, scale = (parts, loss_scale(self.model, groups)) if parts else ([groups[:1]], 0.0)
        batches = [make_batch(part, self.tokenizer, self.model, self.trainable.position_offset) for part in parts]
        with signals.defer_signals():  # a step is made whole or not at all
            loss = training_step(self.model, self.trainable, batches, self.optimizer, scale, self.graphs)
            self.losses.append(loss)
            self.schedule.step()
            self.step += 1
            self.sums["tokens"] += target_tokens(groups)
            self.sums["examples"] += pair_count(groups)
            self.bar.update()
            if self.step % 10 == 0:
                self.sync_losses()
                speed = (self.bar.format_dict["rate"] or 0.0) * self.step_size
                self.bar.set_postfix(
                    loss=f"{self.sums['loss'] / self.sums['tokens']:.3f}",
                    dev_loss=f"{self.log[-1]['dev_loss']:.3f}",
                    examples_per_s=f"{speed:.0f}",
                )

    def sync_losses(self) -> None:
        """Put the losses of the last steps into the sums, which waits for the device: not at every step."""
        losses = torch.stack(self.losses).tolist() if self.losses else []
        for at, loss in enumerate(losses, self.step - len(losses) + 1):
            if not math.isfinite(loss):
                first = self.tokenizer.decode(next(self.batches(at - 1))[0][0]).strip()[:80]
                remedy = f"lower the learning rate (--lr, now {self.lr}), or look at its batch, which begins with"
                raise diverged(loss, f"at step {at}: {remedy} {first!r}", self.out)
            self.sums["loss"] += loss
        self.losses.clear()
        self.sums["seconds"] += time.perf_counter() - self.since
        self.since = time.perf_counter()

    def evaluate(self) -> None:
        """Take the dev loss, keep the best weights, and write everything down."""
        with signals.defer_signals():
            self.sync_losses()
        loss = dev_loss(self.model, self.trainable, self.dev_pairs, self.tokenizer, self.batch_size)
        if not math.isfinite(loss) and self.step == 0:
            raise InputError(f"the loss is {loss} before any training: look at the model's weights, or try --dtype")
        if not math.isfinite(loss):
            where = f"on the dev data after step {self.step}: lower the learning rate (--lr, now {self.lr})"
            raise diverged(loss, where, self.out)
        with signals.defer_signals():
            self.log.append(self.new_row(loss))
            if self.best is None or loss < self.best["dev_loss"]:
                weights = {name: p.detach().clone() for name, p in self.trainable.state_dict().items()}
                self.best = {"dev_loss": loss, "step": self.step, "weights": weights}
            self.sums.update(NO_SUMS)
            self.save()
            if self.step:
                tqdm.write(f"step {self.step:>6}  loss {self.log[-1]['loss']:.4f}  dev loss {loss:.4f}")
            self.since = time.perf_counter()

    def new_row(self, loss: float) -> dict[str, float]:
        """The log's row for a dev loss: see `train`."""
        epoch = round(self.step / batches_per_epoch(self.train_pairs, self.step_size), 3)
        row = {"step": self.step, "epoch": epoch, "dev_loss": loss}
        if self.step:
            row["loss"] = self.sums["loss"] / self.sums["tokens"]
            row["lr"] = self.lr * linear_schedule(self.step - 1, self.steps, self.settings["warmup"])
            row["examples_per_s"] = round(self.sums["examples"] / self.sums["seconds"], 1)
        return row

    def save(self) -> None:
        if distributed.rank() == 0:
            write_jsonl(self.out / "log.jsonl", self.log)
            save_checkpoint(self.out, self.state())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "settings": self.settings, "step": self.step, "log": self.log, "best": self.best, "sums": self.sums,
            "tuned": self.trainable.state_dict(), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }  # fmt: skip

    def resume_from(self, path: Path) -> None:
        """Take over the state in a checkpoint. InputError as in `read_checkpoint`."""
        state = read_checkpoint(path, self.settings)
        try:
            self.step, self.log, self.best, self.sums = (state[key] for key in ("step", "log", "best", "sums"))
            self.trainable.load_state_dict(self.best["weights"])  # fails now, if they do not fit, not after training
            self.trainable.load_state_dict(state["tuned"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.check_resumed()
        except Exception as error:  # whatever the contents of a damaged file lead to
            if out_of_memory(error):  # of the device, say: nothing is wrong with the file
                raise too_little_memory(path) from error
            what = "is of a run that trained something else or of an earlier version, or it is damaged"
            raise InputError(f"{path} {what}: resume with the same settings, or delete it to start again") from error

    def check_resumed(self) -> None:
        """ValueError unless the numbers and the optimiser's tensors of a checkpoint are such as a run writes."""
        numbers = [self.step, self.best["step"], self.best["dev_loss"], *(self.sums[key] for key in NO_SUMS)]
        numbers += [number for row in self.log for number in (row["step"], row["dev_loss"], *row.values())]
        if not self.log or not all(type(n) in (int, float) and abs(n) < 2**53 for n in numbers):
            raise ValueError("a number is missing, or not a number")
        if not 0 <= self.step == self.schedule.last_epoch <= self.steps:
            raise ValueError(f"step {self.step} is not one of the run's")
        names = {"momentum"} if isinstance(self.optimizer, Muon) else {"step", "exp_avg", "exp_avg_sq"}
        for p, moments in self.optimizer.state.items():
            if moments.keys() != names or any(m.shape != p.shape for key, m in moments.items() if key != "step"):
                raise ValueError("the optimiser's state is not of these parameters")

    def save_present_step(self) -> None:
        """What can be saved of a run that was stopped between two dev losses."""
        self.sync_losses()
        if self.log and all(p.isfinite().all() for p in self.trainable.parameters()):
            self.save()


def train(
    model: Model, trainable: Method, tokenizer: Tokenizer, train_pairs: list[Pair], dev_pairs: list[Pair],
    out: str | Path, *, steps: int, batch_size: int, lr: float, warmup: int = 0, eval_every: int = 100,
    seed: int = 101, group: int = 1, accumulate: int = 1, settings: dict[str, Any] | None = None, resume: bool = False,
    compile: bool = False,
) -> tuple[Log, int]:  # fmt: skip
    """Train for `steps` steps; leave the weights with the best dev loss in `trainable` -> (log, best step).

    trainable: a Prefix, or another method of `methods/`; calling it gives the prefix that the model takes.

    As in the authors' runs the loss is averaged over the batch's sentences for GPT-2 (a sentence's being the sum over
    its tokens), over its tokens for BART; and the gradient's norm is cut to 1. A batch is of batch_size pairs; up to
    `group` of a source's targets share a row of it, for which the model reads the source once. A step is on
    `accumulate` batches, one after the other, as if they were one.
    At the start and every `eval_every` steps the dev loss is taken and OUT/checkpoint.pt and OUT/log.jsonl are written,
    the former also when the run is stopped by a signal, or because its output cannot be written. With `resume` it goes
    on from there, on the same CPU bit for bit as if it had not stopped.
    Rows of the log: step, epoch, dev_loss (nats per target token); after the start also loss (likewise, over the steps
    since the last row), lr, examples_per_s.
    compile: run the layers through torch.compile, on CUDA.
    settings: what else must be equal on resume, name -> value. Of several ranks, rank 0 writes; all must see OUT.
    InputError if a loss is not finite, or the run in OUT is of other settings. KeyboardInterrupt, RankLost and OSError
    pass through, the present step being saved first.
    """
    if warmup >= steps:
        raise InputError(f"--warmup is {warmup}: it must be less than the {steps} steps, or the rate never decays")
    settings = {
        **(settings or {}),
        "dtype": str(dtype_of_products(model)), "model": fingerprint(model), "trained": type(trainable).__name__,
        "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "eval_every": eval_every, "seed": seed,
        "group": group, "accumulate": accumulate, "position_offset": trainable.position_offset,
        "training data": digest(train_pairs), "dev data": digest(dev_pairs),
    }  # fmt: skip
    distributed.check_same_on_ranks(settings)  # one rank may lack the data
    run = Run(model, trainable, tokenizer, train_pairs, dev_pairs, Path(out), settings, resume)
    # Rank 0 acts on signals, the others end when it does.
    others = signals.defer_signals() if distributed.rank() else contextlib.nullcontext()
    batches = run.batches(run.step)
    compiling = compiled_layers(model) if compile else contextlib.nullcontext()
    with run.bar, others, packed_weights(model, training=True), compiling:
        try:
            while True:
                if run.eval_due():
                    run.evaluate()
                if run.step == steps:
                    break
                run.train_step(next(batches))
        except (KeyboardInterrupt, distributed.RankLost, OSError):  # OSError: disk full
            with contextlib.suppress(KeyboardInterrupt), signals.defer_signals():  # ignore a second Ctrl-C
                run.save_present_step()
            raise
    trainable.load_state_dict(run.best["weights"])
    return run.log, run.best["step"]


def diverged(loss: float, where: str, out: Path) -> InputError:
    return InputError(f"{DIVERGED} {loss} {where}; then begin anew, with another --out than {out}")


def dtype_of_products(model: Model) -> torch.dtype:
    """What the model multiplies in: autocast's dtype within such a context, else that of its weights."""
    p = next(model.parameters())
    on = torch.is_autocast_enabled(p.device.type)
    return torch.get_autocast_dtype(p.device.type) if on else p.dtype


def digest(pairs: list[Pair]) -> str:
    """A short hash of (source, target) pairs: whether a run is resumed on the data that it began with."""
    sha = hashlib.sha256()
    for pair in pairs:  # one at a time: XSum's would make a text of hundreds of megabytes
        sha.update(json.dumps(pair).encode())
    return sha.hexdigest()[:16]
