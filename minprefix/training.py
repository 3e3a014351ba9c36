"""The optimisation loop: steps, dev loss, checkpoints that a killed run resumes from, a log."""

import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minprefix.batches import bucket_batches, collate, pair_lengths, sorted_batches
from minprefix.files import InputError, atomic_write
from minprefix.loss import target_loss
from minprefix.prefix import fingerprint


def make_optimizer(tuned, lr):
    return torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0, fused=True)


def training_step(model, tuned, batch, optimizer):
    """One step of the optimiser on a batch -> its `target_loss`, without a gradient."""
    loss = target_loss(model, batch, tuned())
    (loss / (len(batch.labels) if model.encoder_decoder else batch.rows)).backward()
    torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def dev_loss(model, tuned, pairs, tokenizer, batch_size):
    """Nats per target token over (source, target) pairs."""
    device = next(model.parameters()).device
    prefix, total, count = tuned(), 0.0, 0
    for picked in sorted_batches(pair_lengths(pairs), batch_size):
        batch = collate([pairs[i] for i in picked], tokenizer, model).to(device)
        total, count = total + target_loss(model, batch, prefix), count + len(batch.labels)
    return float(total) / count


def linear_schedule(step, steps, warmup):
    """The share of the learning rate for a step: linear warm-up, then linear decay to zero."""
    return min((step + 1) / (warmup + 1), (steps - step) / max(1, steps - warmup))


def batch_stream(pairs, batch_size, seed, start):
    """Batches of pairs from step `start` on, epoch after epoch, the same for the same seed."""
    lengths = pair_lengths(pairs)
    per_epoch = math.ceil(len(pairs) / batch_size)
    for epoch in itertools.count(start // per_epoch):
        for picked in bucket_batches(lengths, batch_size, seed, epoch)[start % per_epoch :]:
            yield [pairs[i] for i in picked]
        start = 0


def train(model, tuned, tokenizer, train_pairs, dev_pairs, out, *, steps, batch_size, lr, warmup=0, eval_every=100,
          seed=101, init=None, resume=False):  # fmt: skip
    """Train for `steps` steps of AdamW; leave the weights with the best dev loss in `tuned` -> (log, best step).

    tuned: what is trained, a Prefix, or a comparator of baselines.py: calling it gives the prefix that the model takes.

    As in the authors' runs the loss is averaged over the batch's sentences for GPT-2 (a sentence's being the sum over
    its tokens), over its tokens for BART; and the gradient's norm is cut to 1.
    init: what a prefix was started from, a setting that a resumed run must share.
    At the start and every `eval_every` steps the dev loss is taken and OUT/checkpoint.pt and OUT/log.jsonl are written;
    with `resume` the run goes on from there, on the same CPU bit for bit as if it had not stopped. Rows of the log:
    step, epoch, dev_loss (nats per target token), and after the start loss (likewise, since the last row), lr,
    examples_per_s.
    """
    out, device = Path(out), next(model.parameters()).device
    settings = {
        "dtype": str(dtype_of_products(model)), "model": fingerprint(model), "trained": type(tuned).__name__,
        "steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "eval_every": eval_every, "seed": seed,
        "position_offset": tuned.position_offset, "init": init,
        "training data": digest(train_pairs), "dev data": digest(dev_pairs),
    }  # fmt: skip
    optimizer = make_optimizer(tuned, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_schedule(step, steps, warmup))
    if resume and (out / "checkpoint.pt").exists():
        step, log, best = load_checkpoint(out / "checkpoint.pt", settings, tuned, optimizer, schedule)
        write_log(out, log)
    else:
        step, log, best = 0, [], None

    def evaluate(**measured):
        """Take the dev loss, keep the best weights, and write everything down."""
        nonlocal best
        loss = dev_loss(model, tuned, dev_pairs, tokenizer, batch_size)
        check_finite(loss, step, lr)
        epoch = round(step * batch_size / len(train_pairs), 3)
        log.append({"step": step, "epoch": epoch, "dev_loss": loss, **measured})
        if best is None or loss < best["dev_loss"]:
            weights = {name: p.detach().clone() for name, p in tuned.state_dict().items()}
            best = {"dev_loss": loss, "step": step, "weights": weights}
        save_checkpoint(out, settings, step, log, best, tuned, optimizer, schedule)
        write_log(out, log)

    if not log:
        evaluate()
    bar = tqdm(total=steps, initial=step, desc="training", unit="step", dynamic_ncols=True)
    with bar:
        bar.set_postfix(dev_loss=f"{log[-1]['dev_loss']:.3f}")
        total, tokens, examples, since = torch.zeros((), device=device), 0, 0, time.perf_counter()
        for pairs in itertools.islice(batch_stream(train_pairs, batch_size, seed, step), steps - step):
            batch = collate(pairs, tokenizer, model).to(device)
            loss = training_step(model, tuned, batch, optimizer)
            schedule.step()
            step += 1
            total, tokens, examples = total + loss, tokens + len(batch.labels), examples + batch.rows
            bar.update()
            if step % 10 == 0:  # reading the loss waits for the device: not at every step
                check_finite(loss, step, lr)
                speed = (bar.format_dict["rate"] or 0.0) * batch_size
                bar.set_postfix(loss=f"{float(loss) / len(batch.labels):.3f}",
                                dev_loss=f"{log[-1]['dev_loss']:.3f}", examples_per_s=f"{speed:.0f}")  # fmt: skip
            if step % eval_every == 0 or step == steps:
                mean = float(total) / tokens
                speed = round(examples / (time.perf_counter() - since), 1)
                evaluate(loss=mean, lr=optimizer.param_groups[0]["lr"], examples_per_s=speed)
                bar.write(f"step {step:>6}  loss {mean:.4f}  dev loss {log[-1]['dev_loss']:.4f}")
                total, tokens, examples, since = torch.zeros_like(total), 0, 0, time.perf_counter()
    tuned.load_state_dict(best["weights"])
    return log, best["step"]


def dtype_of_products(model):
    """What the model multiplies in: autocast's dtype within such a context, else that of its weights."""
    p = next(model.parameters())
    on = torch.is_autocast_enabled(p.device.type)
    return torch.get_autocast_dtype(p.device.type) if on else p.dtype


def digest(pairs):
    """A short hash of (source, target) pairs: whether a run is resumed on the data that it began with."""
    sha = hashlib.sha256()
    for pair in pairs:  # one at a time: XSum's would make a text of hundreds of megabytes
        sha.update(json.dumps(pair).encode())
    return sha.hexdigest()[:16]


def check_finite(loss, step, lr):
    if not math.isfinite(loss) and step == 0:
        raise InputError(f"the loss is {float(loss)} before any training: look at the model's weights, or try --dtype")
    if not math.isfinite(loss):
        raise InputError(f"the loss became {float(loss)} at step {step}: lower the learning rate (--lr, now {lr})")


def write_log(out, log):
    with atomic_write(out / "log.jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in log)


def save_checkpoint(out, settings, step, log, best, tuned, optimizer, schedule):
    """OUT/checkpoint.pt: all that the next step depends on."""
    state = {"settings": settings, "step": step, "log": log, "best": best, "tuned": tuned.state_dict(),
             "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}  # fmt: skip
    with atomic_write(out / "checkpoint.pt", "wb") as file:
        torch.save(state, file)


def read_checkpoint(path, settings):
    """The dict that a run saved; InputError if it is damaged, or its "settings" are not these."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["settings"])
    except Exception as error:  # torch.load documents no closed list of errors for a damaged file
        raise InputError(f"{path} cannot be resumed from, it is damaged: delete it to start again") from error
    for key, value in settings.items():
        if saved.get(key) != value:
            hidden = key in ("model", "training data", "dev data")  # known by their digests only
            was = f"another {key}" if hidden else f"{key} = {saved.get(key)}, not {value}"
            raise InputError(f"{path} is of a run with {was}: resume with the same settings")
    return state


def load_checkpoint(path, settings, tuned, optimizer, schedule):
    """Put a run's state back -> (step, log, best). InputError as in `read_checkpoint`."""
    state = read_checkpoint(path, settings)
    try:
        tuned.load_state_dict(state["tuned"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return state["step"], state["log"], state["best"]
    except (RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is of a run that trained something else: resume with the same settings") from error
