"""Pre-train a bundled model from a plain text corpus: first the BPE, then the language model.

    python weights/pretrain.py bpe   --corpus corpus/ --out weights/gpt2-mini --vocab-size 4096
    python weights/pretrain.py train --corpus corpus/ --out weights/gpt2-mini --tokens 60e6     (again: resumes)

The BPE is trained by HuggingFace's `tokenizers` (pip install -e ".[pretrain]"). The corpus folder holds
`pretrain.txt.xz` and `heldout.txt.xz`, documents separated by <|endoftext|>. Runs on CPU or one GPU. Learning rate:
warm-up, constant, linear decay over the last `--decay` of the tokens; so `--tokens` may be changed on resume until the
decay begins. Hidden matrices are trained by Muon, everything else by AdamW, all in bf16 with float32 master weights.
"""

import argparse
import json
import lzma
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from minprefix.checkpoint import write_safetensors
from minprefix.files import atomic_write, run_main
from minprefix.gpt2 import GPT2, to_huggingface
from minprefix.tokenizer import load_tokenizer

END = "<|endoftext|>"


def read_documents(path):
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [document.strip() for document in file.read().split(END) if document.strip()]


def train_bpe(args):
    """`vocab.json` and `merges.txt` from the corpus; the end token gets the last id, as in GPT-2."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    documents = read_documents(args.corpus / "pretrain.txt.xz")
    bpe.train_from_iterator(documents, vocab_size=args.vocab_size - 1, min_frequency=2)
    args.out.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(args.out))
    vocab = json.loads((args.out / "vocab.json").read_text(encoding="utf-8"))
    with atomic_write(args.out / "vocab.json") as file:
        json.dump({**vocab, END: len(vocab)}, file, ensure_ascii=False)


def corpus_ids(args, split):
    """All documents of a split as one uint16 array, each followed by the end token; kept beside the run's state."""
    cached = args.state / f"{split}.npy"
    if not cached.exists():
        tokenizer = load_tokenizer(args.out)
        documents = read_documents(args.corpus / f"{split}.txt.xz")
        np.random.default_rng(0).shuffle(documents)
        chunks = [np.array([*tokenizer.encode(text), tokenizer.end_id], np.uint16) for text in documents]
        with atomic_write(cached, "wb") as file:
            np.save(file, np.concatenate(chunks))
    return np.load(cached, mmap_mode="r")


def rows(ids, order, step, batch_size, T):
    """The batch of a step: rows of T + 1 tokens, in the shuffled order of the epoch that the step falls into."""
    picked = order[np.arange(step * batch_size, (step + 1) * batch_size) % len(order)]
    return torch.from_numpy(np.stack([ids[i * T : i * T + T + 1] for i in picked]).astype(np.int64))


def random_start(args, step):
    """Rows begin at a random position, so that all positions are trained and a prefix of any length shifts nothing."""
    return int(np.random.default_rng([args.seed, step]).integers(args.positions - args.length + 1))


def new_model(args, vocab_size):
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab_size,
        "n_positions": args.positions, "n_embd": args.width, "n_layer": args.layers, "n_head": args.heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1,
        "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    model = GPT2(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:  # GPT-2's initialisation: residual projections smaller with depth
            scale = (2 * args.layers) ** -0.5 if name.endswith("c_proj.weight") else 1.0
            torch.nn.init.normal_(p, std=0.02 * scale)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    with torch.no_grad():  # sinusoids are a better start than noise where positions are learned from little text
        angle = torch.arange(args.positions)[:, None] * 10000 ** -(torch.arange(0, args.width, 2) / args.width)
        model.wpe.weight.copy_(0.02 * torch.cat([angle.sin(), angle.cos()], dim=1))
    return model


def loss_of(model, batch, start=0, backward=False, chunk=1024):
    """Mean nats per token of rows of T + 1 tokens; with `backward`, the gradients too.

    The head goes chunk by chunk: logits that stay in the cache made it about twice as fast on CPU.
    """
    states = model.hidden(batch[:, :-1], start=start)
    leaf = states.detach().requires_grad_(backward)
    total = 0.0
    for h, y in zip(leaf.flatten(0, 1).split(chunk), batch[:, 1:].flatten().split(chunk), strict=True):
        loss = F.cross_entropy(model.logits(h).float(), y, reduction="sum") / batch[:, 1:].numel()
        if backward:
            loss.backward()
        total = total + loss.detach()
    if backward:
        states.backward(leaf.grad)
    return total


def make_optimizers(masters, args):
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms (over the float32 masters)."""
    matrices = [p for name, p in masters.items() if name.startswith("h.") and p.dim() == 2]
    others = [p for name, p in masters.items() if not (name.startswith("h.") and p.dim() == 2)]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def learning_rate(args, seen):
    """Warm-up over 1% of the tokens, constant, linear decay to zero over the last `decay` share."""
    return args.lr * min(1.0, (seen + 1) / (0.01 * args.tokens), (args.tokens - seen) / (args.decay * args.tokens))


@torch.no_grad()
def held_out_loss(model, ids, args, device, batches=24):
    """Nats per token over the first rows of the held-out text."""
    order = np.arange((len(ids) - 1) // args.length)
    batches = min(batches, len(order) // args.batch_size)
    losses = [loss_of(model, rows(ids, order, i, args.batch_size, args.length).to(device)) for i in range(batches)]
    return torch.stack(losses).mean().item()


def train(args):
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.state.mkdir(parents=True, exist_ok=True)
    train_ids, heldout_ids = corpus_ids(args, "pretrain"), corpus_ids(args, "heldout")
    order = np.random.default_rng(args.seed).permutation((len(train_ids) - 1) // args.length)
    model = new_model(args, load_tokenizer(args.out).vocab_size).to(device)
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    optimizers = make_optimizers(masters, args)
    step, log = 0, []
    if (args.state / "state.pt").exists():
        state = torch.load(args.state / "state.pt", map_location=device, weights_only=True)
        step, log = state["step"], state["log"]
        with torch.no_grad():
            for name, p in masters.items():
                p.copy_(state["masters"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    copy_weights(model, masters)

    tokens_per_step = args.batch_size * args.length
    steps = int(args.tokens) // tokens_per_step
    started = saved_at = time.time()
    bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)
    while step < steps:
        lr = learning_rate(args, step * tokens_per_step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        batch = rows(train_ids, order, step, args.batch_size, args.length).to(device)
        loss = loss_of(model, batch, random_start(args, step), backward=True)
        update(model, masters, optimizers)
        step += 1
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens=f"{step * tokens_per_step / 1e6:.1f}M")
        if step % args.eval_every == 0 or step == steps:
            held_out = held_out_loss(model, heldout_ids, args, device)
            log.append({"tokens": step * tokens_per_step, "loss": loss.item(), "heldout": held_out, "lr": lr,
                        "hours": round((time.time() - started) / 3600, 3)})  # fmt: skip
            bar.write(json.dumps(log[-1]))
        if time.time() - saved_at > args.save_every or step == steps:
            save_state(args, step, log, masters, optimizers)
            export(args, model, masters, log)
            saved_at = time.time()


def update(model, masters, optimizers):
    """One optimiser step on the masters from the model's bf16 gradients."""
    for name, p in model.named_parameters():
        masters[name].grad, p.grad = p.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    copy_weights(model, masters)


@torch.no_grad()
def copy_weights(model, masters):
    for name, p in model.named_parameters():
        p.copy_(masters[name])


def save_state(args, step, log, masters, optimizers):
    state = {"step": step, "log": log, "masters": {n: p.detach() for n, p in masters.items()},
             "optimizers": [o.state_dict() for o in optimizers]}  # fmt: skip
    with atomic_write(args.state / "state.pt", "wb") as file:
        torch.save(state, file)


def export(args, model, masters, log):
    """The HuggingFace folder in float16, and the log of held-out losses beside it."""
    half = GPT2(model.config).half()
    half.load_state_dict(masters)
    write_safetensors(args.out / "model.safetensors", to_huggingface(half), {"format": "pt"})
    with atomic_write(args.out / "config.json") as file:
        json.dump({**model.config, "dtype": "float16"}, file, indent=2)
    with atomic_write(args.out / "pretraining.jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in log)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bpe", "train"])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with pretrain.txt.xz and heldout.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--state", type=Path, default=Path("runs/pretrain"), help="resumable state and encoded corpus")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--length", type=int, default=256, help="tokens of a training row")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--tokens", type=float, default=60e6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--eval-every", type=int, default=250, help="steps")
    parser.add_argument("--save-every", type=int, default=300, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train_bpe(args) if args.what == "bpe" else train(args)


if __name__ == "__main__":
    run_main(main)
