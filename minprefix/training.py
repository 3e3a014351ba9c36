"""The optimisation loop: steps, dev loss, checkpoints that a killed run resumes from, a log."""

import contextlib
import hashlib
import itertools
import json
import math
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from minprefix import distributed, signals
from minprefix.baselines import Tuned
from minprefix.batches import Batch, Pair, bucket_batches, collate, pair_lengths, sorted_batches
from minprefix.files import InputError, atomic_write
from minprefix.linear import packed_weights
from minprefix.load import Model
from minprefix.loss import target_loss
from minprefix.muon import Muon
from minprefix.prefix import Prefix, fingerprint
from minprefix.tokenizer import Tokenizer

Log = list[dict[str, float]]  # rows: see `train`
NO_SUMS: dict[str, float] = {"loss": 0.0, "tokens": 0, "examples": 0, "seconds": 0.0}


def make_optimizer(tuned: Tuned, lr: float) -> Optimizer:
    """Muon for keys and values that are trained directly, AdamW, as the paper, for all else."""
    if isinstance(tuned, Prefix) and tuned.hidden == 0:
        return Muon(tuned.parameters(), lr)
    return torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0, fused=True)


def training_step(model: Model, tuned: Tuned, batch: Batch, optimizer: Optimizer, share: float = 1.0) -> Tensor:
    """One step of the optimiser on a batch -> its `target_loss`, without a gradient.

    share: what part of the whole batch this is (of its sentences, or for BART of its tokens), the rest being that of
    other ranks; the loss returned is the whole batch's.
    """
    loss = target_loss(model, batch, tuned())
    (loss / (len(batch.labels) if model.encoder_decoder else batch.rows) * share).backward()
    loss = loss.detach() if share else torch.zeros_like(loss)
    distributed.add_up([*(p.grad for p in tuned.parameters() if p.grad is not None), loss])
    torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


@torch.no_grad()
def dev_loss(model: Model, tuned: Tuned, pairs: list[Pair], tokenizer: Tokenizer, batch_size: int) -> float:
    """Nats per target token over (source, target) pairs."""
    device = next(model.parameters()).device
    prefix, total = tuned(), torch.zeros((), device=device)
    for picked in distributed.share(sorted_batches(pair_lengths(pairs), batch_size)):
        batch = collate([pairs[i] for i in picked], tokenizer, model).to(device)
        total = total + target_loss(model, batch, prefix)
    distributed.add_up([total])
    return float(total) / target_tokens(pairs)


def target_tokens(pairs: list[Pair]) -> int:
    return sum(len(target) for _, target in pairs)


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate for a step: linear warm-up, then linear decay to zero."""
    return min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def batch_stream(
    pairs: list[Pair], batch_size: int, seed: int, start: int, encoder_decoder: bool = False
) -> Iterator[list[Pair]]:
    """Batches of pairs from step `start` on, epoch after epoch, the same for the same seed.

    encoder_decoder: whether they are for a BART, which pads sources and targets apart.
    """
    apart = [(len(source), len(target)) for source, target in pairs]
    lengths = np.array(apart if encoder_decoder else pair_lengths(pairs))
    per_epoch = math.ceil(len(pairs) / batch_size)
    for epoch in itertools.count(start // per_epoch):
        for picked in bucket_batches(lengths, batch_size, seed, epoch)[start % per_epoch :]:
            yield [pairs[i] for i in picked]
        start = 0


def train(
    model: Model, tuned: Tuned, tokenizer: Tokenizer, train_pairs: list[Pair], dev_pairs: list[Pair],
    out: str | Path, *, steps: int, batch_size: int, lr: float, warmup: int = 0, eval_every: int = 100,
    seed: int = 101, settings: dict[str, Any] | None = None, resume: bool = False,
) -> tuple[Log, int]:  # fmt: skip
    """Train for `steps` steps; leave the weights with the best dev loss in `tuned` -> (log, best step).

    tuned: what is trained, a Prefix, or a comparator of baselines.py: calling it gives the prefix that the model takes.

    As in the authors' runs the loss is averaged over the batch's sentences for GPT-2 (a sentence's being the sum over
    its tokens), over its tokens for BART; and the gradient's norm is cut to 1.
    At the start and every `eval_every` steps the dev loss is taken and OUT/checkpoint.pt and OUT/log.jsonl are written,
    the former also when a signal stops the run; with `resume` it goes on from there, on the same CPU bit for bit as if
    it had not stopped. Rows of the log: step, epoch, dev_loss (nats per target token), and after the start loss
    (likewise, since the last row), lr, examples_per_s.
    settings: what else a resumed run must share, name -> value. Of several ranks, rank 0 writes; all must see OUT.
    InputError if a loss is not finite, or the run in OUT is of other settings; KeyboardInterrupt, RankLost.
    """
    out, device = Path(out), next(model.parameters()).device
    settings = {
        **(settings or {}),
        "dtype": str(dtype_of_products(model)), "model": fingerprint(model), "trained": type(tuned).__name__,
        "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "eval_every": eval_every, "seed": seed,
        "position_offset": tuned.position_offset,
        "training data": digest(train_pairs), "dev data": digest(dev_pairs),
    }  # fmt: skip
    optimizer = make_optimizer(tuned, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_schedule(step, steps, warmup))
    step = 0
    log: Log = []
    best: Any = None  # dev_loss, step and weights
    sums = dict(NO_SUMS)  # since the last row of the log
    if resume and (out / "checkpoint.pt").exists():
        step, log, best, sums = load_checkpoint(out / "checkpoint.pt", settings, tuned, optimizer, schedule)
    for name in ("checkpoint.pt", "log.jsonl") if distributed.rank() == 0 else ():
        for left in out.glob(f"{name}.*.tmp"):
            left.unlink()  # a process was killed as it wrote it
    losses: list[Tensor] = []  # of the last steps, on the device
    since = time.perf_counter()  # when the first of them began

    def read_losses() -> None:
        """Put the losses of the last steps into the sums, which waits for the device: not at every step."""
        nonlocal since
        for at, loss in enumerate(torch.stack(losses).tolist() if losses else [], step - len(losses) + 1):
            if not math.isfinite(loss):
                batch = next(batch_stream(train_pairs, batch_size, seed, at - 1, model.encoder_decoder))
                first = tokenizer.decode(batch[0][0]).strip()[:80]
                remedy = f"lower the learning rate (--lr, now {lr}), or look at its batch, which begins with"
                raise diverged(loss, f"at step {at}: {remedy} {first!r}", out)
            sums["loss"] += loss
        losses.clear()
        sums["seconds"] += time.perf_counter() - since
        since = time.perf_counter()

    def save() -> None:
        if distributed.rank() == 0:
            write_log(out, log)
            save_checkpoint(out, settings, step, log, best, sums, tuned, optimizer, schedule)

    def evaluate() -> None:
        """Take the dev loss, keep the best weights, and write everything down."""
        nonlocal best, since
        with signals.put_off():
            read_losses()
        loss = dev_loss(model, tuned, dev_pairs, tokenizer, batch_size)
        if not math.isfinite(loss) and step == 0:
            raise InputError(f"the loss is {loss} before any training: look at the model's weights, or try --dtype")
        if not math.isfinite(loss):
            raise diverged(loss, f"on the dev data after step {step}: lower the learning rate (--lr, now {lr})", out)
        with signals.put_off():
            log.append({"step": step, "epoch": round(step * batch_size / len(train_pairs), 3), "dev_loss": loss})
            if step:
                speed = round(sums["examples"] / sums["seconds"], 1)
                mean, rate = sums["loss"] / sums["tokens"], optimizer.param_groups[0]["lr"]
                log[-1].update(loss=mean, lr=rate, examples_per_s=speed)
                bar.write(f"step {step:>6}  loss {mean:.4f}  dev loss {loss:.4f}")
            if best is None or loss < best["dev_loss"]:
                weights = {name: p.detach().clone() for name, p in tuned.state_dict().items()}
                best = {"dev_loss": loss, "step": step, "weights": weights}
            sums.update(NO_SUMS)
            save()
            since = time.perf_counter()

    # Rank 0 acts on signals, the others end when it does.
    others = signals.put_off() if distributed.rank() else contextlib.nullcontext()
    bar = tqdm(total=steps, initial=step, desc="training", unit="step", dynamic_ncols=True,
               disable=distributed.rank() > 0)  # fmt: skip
    batches = batch_stream(train_pairs, batch_size, seed, step, model.encoder_decoder)
    with bar, others, packed_weights(model, training=True):
        try:
            while True:
                if (step % eval_every == 0 or step == steps) and (not log or log[-1]["step"] < step):
                    evaluate()
                if step == steps:
                    break
                pairs = next(batches)
                mine = distributed.share(pairs)
                batch = collate(mine or pairs[:1], tokenizer, model).to(device)
                share = target_tokens(mine) / target_tokens(pairs) if model.encoder_decoder else len(mine) / len(pairs)
                with signals.put_off():  # a step is made whole or not at all
                    losses.append(training_step(model, tuned, batch, optimizer, share))
                    schedule.step()
                    step += 1
                    sums["tokens"] += target_tokens(pairs)
                    sums["examples"] += len(pairs)
                    bar.update()
                    if step % 10 == 0:
                        read_losses()
                        speed = (bar.format_dict["rate"] or 0.0) * batch_size
                        bar.set_postfix(
                            loss=f"{sums['loss'] / sums['tokens']:.3f}",
                            dev_loss=f"{log[-1]['dev_loss']:.3f}",
                            examples_per_s=f"{speed:.0f}",
                        )
        except (KeyboardInterrupt, distributed.RankLost):
            with contextlib.suppress(KeyboardInterrupt), signals.put_off():  # one is enough
                read_losses()
                if log and all(p.isfinite().all() for p in tuned.parameters()):  # before the first row all is to do
                    save()
            raise
    tuned.load_state_dict(best["weights"])
    return log, best["step"]


def diverged(loss: float, where: str, out: Path) -> InputError:
    return InputError(f"the loss became {loss} {where}; {out}/checkpoint.pt is of an earlier step")


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


def write_log(out: Path, log: Log) -> None:
    with atomic_write(out / "log.jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in log)


def save_checkpoint(
    out: Path, settings: dict[str, Any], step: int, log: Log, best: dict[str, Any] | None, sums: dict[str, float],
    tuned: Tuned, optimizer: Optimizer, schedule: LambdaLR,
) -> None:  # fmt: skip
    """OUT/checkpoint.pt: all that the next step depends on."""
    state = {"settings": settings, "step": step, "log": log, "best": best, "sums": sums, "tuned": tuned.state_dict(),
             "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}  # fmt: skip
    with atomic_write(out / "checkpoint.pt", "wb") as file:
        torch.save(state, file)


def read_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The dict that a run saved; InputError if it is damaged, or its "settings" are not these."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            if damaged := file.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["settings"])
        differing = [key for key in {**settings, **saved} if saved.get(key) != settings.get(key)]
    except Exception as error:  # torch.load documents no closed list of errors for a damaged file
        raise InputError(f"{path} cannot be resumed from, it is damaged: delete it to start again") from error
    for key in differing:
        hidden = key in ("model", "training data", "dev data")  # known by their digests only
        was = f"another {key}" if hidden else f"{key} = {saved.get(key)}, not {settings.get(key)}"
        raise InputError(f"{path} is of a run with {was}: resume with the same settings")
    return state


def load_checkpoint(
    path: Path, settings: dict[str, Any], tuned: Tuned, optimizer: Optimizer, schedule: LambdaLR
) -> tuple[int, Log, dict[str, Any], dict[str, float]]:
    """Put a run's state back -> (step, log, best, sums). InputError as in `read_checkpoint`."""
    state = read_checkpoint(path, settings)
    try:
        if not is_of_this_run(state, settings["steps"], tuned, optimizer, schedule):
            raise ValueError("its contents have another form")
        tuned.load_state_dict(state["tuned"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return state["step"], state["log"], state["best"], state["sums"]
    except Exception as error:  # whatever the contents of a damaged file lead to
        what = "is of a run that trained something else, or damaged"
        raise InputError(f"{path} {what}: resume with the same settings, or delete it to start again") from error


def is_of_this_run(state: dict[str, Any], steps: int, tuned: Tuned, optimizer: Optimizer, schedule: LambdaLR) -> bool:
    """Whether all that a run goes on from has the form in which this run would have saved it."""
    weights = tuned.state_dict()
    names = ["momentum"] if isinstance(optimizer, Muon) else ["exp_avg", "exp_avg_sq"]
    step = {} if isinstance(optimizer, Muon) else {"step": torch.zeros(())}
    moments = {i: {**step, **dict.fromkeys(names, p)} for i, p in enumerate(tuned.parameters())}
    moments = {i: moments[i] for i in state["optimizer"]["state"]}  # none before the first step
    own = {
        "step": 0, "best": {"dev_loss": 0.0, "step": 0, "weights": weights}, "sums": NO_SUMS,
        "tuned": weights, "optimizer": {**optimizer.state_dict(), "state": moments}, "schedule": schedule.state_dict(),
    }  # fmt: skip
    rows = [row for row in state["log"] if {"step", "dev_loss"} <= row.keys()]
    numbers = [value for row in rows for value in row.values()]
    return (
        all(same_form(state[key], value) for key, value in own.items())
        and 0 <= state["step"] == state["schedule"]["last_epoch"] <= steps
        and isinstance(state["log"], list) and 0 < len(rows) == len(state["log"])
        and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        and all(0 <= number < 2**53 for number in state["sums"].values())
    )  # fmt: skip


def same_form(saved: object, own: object) -> bool:
    """Whether a saved value equals another in keys, lengths, types and shapes, and in all but numbers and tensors."""
    if isinstance(own, torch.Tensor):
        form = own.shape, own.dtype, torch.strided, "cpu"
        return isinstance(saved, torch.Tensor) and (saved.shape, saved.dtype, saved.layout, saved.device.type) == form
    if isinstance(own, dict):
        return isinstance(saved, dict) and saved.keys() == own.keys() and all(same_form(saved[k], own[k]) for k in own)
    if isinstance(own, (list, tuple)):
        return type(saved) is type(own) and len(saved) == len(own) and all(map(same_form, saved, own))
    return type(saved) is type(own) and (type(own) in (int, float) or saved == own)
