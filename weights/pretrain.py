"""Pre-train a bundled model from a plain text corpus: first the BPE, then GPT-2 as a language model or BART to denoise.

    python weights/pretrain.py bpe  --corpus corpus/ --out weights/gpt2-mini --vocab-size 4096
    python weights/pretrain.py gpt2 --corpus corpus/ --out weights/gpt2-mini --tokens 60e6     (again: resumes)
    python weights/pretrain.py bart --corpus corpus/ --out weights/bart-mini --bpe weights/gpt2-mini --tokens 60e6
    python weights/pretrain.py gpt2 --corpus corpus/ --out weights/gpt2-mini --seconds 240                (on a GPU)

The BPE is trained by HuggingFace's `tokenizers` (pip install -e ".[pretrain]"). The corpus folder holds
`pretrain.txt.xz` and `heldout.txt.xz`, documents separated by <|endoftext|>. Runs on CPU or one GPU. Learning rate:
warm-up, constant, linear decay over the last `--decay` of the run; so `--tokens` may be changed on resume until the
decay begins. With `--seconds` the run is as long as that, whatever the machine's speed. Hidden matrices are trained
by Muon, everything else by AdamW, all in bf16 with float32 master weights.
"""

import argparse
import hashlib
import json
import lzma
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minprefix.cli.options import Parser, check_above_zero, check_not_negative, fill_defaults
from minprefix.core import bart, gpt2
from minprefix.core.attention import length_mask
from minprefix.core.batches import IGNORE, pad
from minprefix.core.checkpointing import read_checkpoint
from minprefix.core.model import Model
from minprefix.formats.load import check_state, load_model, save_model
from minprefix.formats.tokenizer import Tokenizer, load_tokenizer
from minprefix.system.device import keep_freed_memory
from minprefix.system.errors import InputError, run_main
from minprefix.system.files import atomic_write, read_json, write_jsonl

END = "<|endoftext|>"
Rows = tuple[tuple[Any, ...], Tensor, int]  # model inputs, labels, the position of the first token


def corpus_file(args: argparse.Namespace, split: str) -> Path:
    path = args.corpus / f"{split}.txt.xz"
    if not path.is_file():
        raise InputError(f"{path} is missing: documents separated by {END}, compressed by xz")
    return path


def read_documents(path: Path) -> list[str]:
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            documents = file.read().split(END)
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not UTF-8 text compressed by xz, or damaged ({error})") from error
    return [document.strip() for document in documents if document.strip()]


def train_bpe(args: argparse.Namespace) -> None:
    """`vocab.json` and `merges.txt` from the corpus; the end token gets the last id, as in GPT-2."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise InputError("training a BPE needs tokenizers: pip install -e '.[pretrain]'") from error
    bpe = ByteLevelBPETokenizer()
    documents = read_documents(corpus_file(args, "pretrain"))
    bpe.train_from_iterator(documents, vocab_size=args.vocab_size - 1, min_frequency=2)
    args.out.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(args.out))
    vocab = json.loads((args.out / "vocab.json").read_text(encoding="utf-8"))
    with atomic_write(args.out / "vocab.json") as file:
        json.dump({**vocab, END: len(vocab)}, file, ensure_ascii=False)


def bart_vocabulary(args: argparse.Namespace) -> None:
    """The BPE of another folder with BART's special tokens: `<s> <pad> </s> <unk>` first, `<mask>` last."""
    if args.bpe is None:
        raise InputError(f"{args.out} has no vocab.json: give --bpe, the folder whose BPE it shall have")
    check_bpe(args.bpe)
    vocab = read_json(args.bpe / "vocab.json")
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(t for t in sorted(vocab, key=vocab.get) if t != END), "<mask>"]
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.bpe / "merges.txt", args.out / "merges.txt")
    with atomic_write(args.out / "vocab.json") as file:
        json.dump({token: i for i, token in enumerate(tokens)}, file, ensure_ascii=False)


def check_bpe(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}: train a BPE first (pretrain.py bpe), or copy one there")


def digest(*paths: Path) -> str:
    """A short hash of what is in files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def vocabulary_digest(folder: Path) -> str:
    return digest(folder / "vocab.json", folder / "merges.txt")


def corpus_ids(args: argparse.Namespace, split: str) -> np.ndarray:
    """All documents of a split as one uint16 array, each followed by the end token; kept beside the run's state."""
    path = corpus_file(args, split)
    cached = args.state / f"{split}-{vocabulary_digest(args.out)}-{digest(path)}.npy"
    if not cached.exists():
        tokenizer = load_tokenizer(args.out)
        documents = read_documents(path)
        np.random.default_rng(0).shuffle(documents)
        chunks = [np.array([*tokenizer.encode(text), tokenizer.end_id], np.uint16) for text in documents]
        with atomic_write(cached, "wb") as file:
            np.save(file, np.concatenate(chunks))
    return np.load(cached, mmap_mode="r")


def language_modelling(args: argparse.Namespace, ids: np.ndarray, seed: int) -> Callable[[int], Rows]:
    """step -> (model inputs, labels, start): rows of --length tokens, each once an epoch, the labels one further on.

    Rows begin at a random position, so that all positions are trained and a prefix of any length shifts nothing. A
    share of --copies has its first half repeated in the second, every other one with the tokens of that half in random
    order: a model learns to copy what it reads, also what it would not have expected.
    """
    B, T = args.batch_size, args.length
    order = np.random.default_rng(seed).permutation((len(ids) - 1) // T)
    copies, half = round(args.copies * B), (T + 1) // 2

    def batch(step: int) -> Rows:
        rng = np.random.default_rng([seed, step])
        picked = order[np.arange(step * B, (step + 1) * B) % len(order)]
        rows = np.stack([ids[i * T : i * T + T + 1] for i in picked]).astype(np.int64)
        rows[: copies // 2, :half] = rng.permuted(rows[: copies // 2, :half], axis=1)
        rows[:copies, half : 2 * half] = rows[:copies, :half]
        rows = torch.from_numpy(rows)
        return (rows[:, :-1],), rows[:, 1:], int(rng.integers(args.positions - T + 1))

    return batch


def denoising(args: argparse.Namespace, ids: np.ndarray, seed: int) -> Callable[[int], Rows]:
    """step -> (model inputs, labels, start): whole sentences to be restored from a noised copy (Lewis et al. 2020).

    Steps take turns at rows of a quarter, half, once and twice --length tokens, with the same number of tokens in all:
    copying is learned on the short rows first. Half of the rows have their sentences permuted. Decoder positions begin
    at random below 64, so that a prefix may shift them; encoder positions at 0, where a prefix leaves them.
    """
    tokenizer = load_tokenizer(args.out)
    mask, start_id, end_id = (tokenizer.special[token] for token in ("<mask>", "<s>", "</s>"))
    boundaries = sentence_starts(ids, tokenizer)

    def batch(step: int) -> Rows:
        rng = np.random.default_rng([seed, step])
        scale = (0.25, 0.5, 1, 2)[step % 4]
        B, T = round(args.batch_size / scale), round(args.length * scale)
        sources, targets = [], []
        for start in boundaries[rng.integers(np.searchsorted(boundaries, len(ids) - T), size=B)]:
            cuts = boundaries[np.searchsorted(boundaries, start + 1) : np.searchsorted(boundaries, start + T - 1)]
            sentences = np.split(ids[start : start + T - 2].astype(np.int64), cuts - start)
            sentences = sentences[:-1] or sentences  # the last is cut off, unless it is the only one
            sentences = [part[part != end_id] for part in sentences]  # no marks between documents
            order = rng.permutation(len(sentences)) if rng.random() < 0.5 else range(len(sentences))
            noised = infill(np.concatenate([sentences[i] for i in order]), mask, rng)
            sources.append([start_id, *noised, end_id])
            targets.append([start_id, *np.concatenate(sentences), end_id])
        source = pad(sources, tokenizer.pad_id, 16)[:, : args.positions]  # a GPU's attention kernels want such widths
        labels = pad(targets, IGNORE, 16)[:, : args.positions]
        inputs = torch.full_like(labels, end_id)  # BART's decoder starts from </s>
        inputs[:, 1:] = labels[:, :-1].where(labels[:, :-1] != IGNORE, tokenizer.pad_id)
        real = length_mask(torch.tensor([len(row) for row in sources]), source.size(1))
        return (source, inputs, real), labels, int(rng.integers(min(64, args.positions - labels.size(1) + 1)))

    return batch


def sentence_starts(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Positions after a token that ends in . ! ? or a line end, before one that begins with white space."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    ends = np.array([text.rstrip("\"')\u201d ").endswith((".", "!", "?", "\n")) for text in texts])
    begins = np.array([text[:1].isspace() for text in texts])
    after_document = np.asarray(ids[:-1]) == tokenizer.end_id
    return np.flatnonzero(ends[ids[:-1]] & begins[ids[1:]] | after_document) + 1


def infill(tokens: np.ndarray, mask: int, rng: np.random.Generator, share: float = 0.3, mean: float = 3) -> list[int]:
    """Text infilling: spans of Poisson(mean) tokens, `share` of all, each become one mask; empty spans insert one."""
    spans, budget = [], round(share * len(tokens))
    while budget > 0:
        spans.append(min(rng.poisson(mean), budget))
        budget -= spans[-1]
    kept = len(tokens) - sum(spans)
    gaps = np.sort(rng.permutation(kept + 1)[: len(spans)])  # where among the kept tokens: no two spans touch
    noised, at = [], 0
    for gap, length in zip(np.diff(gaps, prepend=0), spans, strict=False):
        noised += [*tokens[at : at + gap], mask]
        at += gap + length
    return [*noised, *tokens[at:]]


def new_model(args: argparse.Namespace, vocab_size: int) -> Model:
    """GPT-2 or BART with random weights: the usual initialisation, sinusoids for the positions."""
    if args.what == "gpt2":
        model = gpt2.GPT2({
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab_size,
            "n_positions": args.positions, "n_embd": args.width, "n_layer": args.layers, "n_head": args.heads,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1,
            "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        })  # fmt: skip
    else:
        shape = {"layers": args.layers, "attention_heads": args.heads, "ffn_dim": 4 * args.width}
        model = bart.BART({
            "architectures": ["BartForConditionalGeneration"], "model_type": "bart", "is_encoder_decoder": True,
            "vocab_size": vocab_size, "max_position_embeddings": args.positions, "d_model": args.width,
            **{f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in shape.items()},
            "forced_bos_token_id": 0, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
        })  # fmt: skip
    for name, p in model.named_parameters():
        if p.dim() == 2:  # GPT-2's initialisation: residual projections smaller with depth
            residual = name.endswith(("c_proj.weight", "out_proj.weight", "fc2.weight"))
            torch.nn.init.normal_(p, std=0.02 * ((2 * args.layers) ** -0.5 if residual else 1.0))
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
        if "wpe" in name or "embed_positions" in name:  # a better start than noise where there is little text
            angle = torch.arange(len(p))[:, None] * 10000 ** -(torch.arange(0, args.width, 2) / args.width)
            p.data.copy_(0.02 * torch.cat([angle.sin(), angle.cos()], dim=1))
    return model


def start_from(folder: str, model: Model) -> None:
    """Put the weights of a finished run's folder, of a model of the same shape, into `model`."""
    weights = load_model(folder).state_dict()
    check_state(weights, model.state_dict(), folder)
    model.load_state_dict(weights)


@torch.compile
def head_loss(model: Model, states: Tensor, labels: Tensor) -> Tensor:
    """Nats of the labels (N,) after the states (N, C), summed."""
    return F.cross_entropy(model.logits(states).float(), labels, reduction="sum")


def loss_of(model: Model, batch: Rows, device: str, backward: bool = False) -> Tensor:
    """Mean nats per token of a batch; with `backward`, the gradients too.

    The head goes chunk by chunk: logits that stay in the cache made it about twice as fast on CPU.
    """
    inputs, labels, start = batch
    chunk = 1024 if device == "cpu" else 16384
    states = model.hidden_states(*(x.to(device) for x in inputs), start=start).flatten(0, 1)
    real = labels.flatten() != IGNORE
    states, labels = states[real.nonzero()[:, 0].to(device)], labels.flatten()[real].to(device)
    leaf = states.detach().requires_grad_(backward)
    total = torch.zeros((), device=device)
    for h, y in zip(leaf.split(chunk), labels.split(chunk), strict=True):
        loss = head_loss(model, h, y) / len(labels)
        if backward:
            loss.backward()
        total = total + loss.detach()
    if backward:
        states.backward(leaf.grad)
    return total


def make_optimizers(masters: dict[str, Tensor], args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, biases and norms (over the float32 masters)."""
    inside = {name for name, p in masters.items() if p.dim() == 2 and (name.startswith("h.") or ".layers." in name)}
    matrices = [p for name, p in masters.items() if name in inside]
    others = [p for name, p in masters.items() if name not in inside]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def learning_rate(args: argparse.Namespace, done: float) -> float:
    """Warm-up over 1% of the run, constant, linear decay to zero over the last `decay` share; done: 0 to 1."""
    return args.lr * min(1.0, max(done, 1e-4) / 0.01, (1 - done) / args.decay)


@torch.no_grad()
def held_out_loss(model: Model, batches: list[Rows], device: str) -> float:
    """Nats per token over some batches of the held-out text."""
    return torch.stack([loss_of(model, batch, device) for batch in batches]).mean().item()


@torch.no_grad()
def copying_loss(model: gpt2.GPT2, ids: np.ndarray, device: str, rows: int = 32, length: int = 64) -> dict[str, float]:
    """Nats per token of a language model on the second copy of rows that are repeated: {"text": x, "random": y}.

    The rows are passages of `ids`, or random tokens. A prefix can make a model tell what its input says only if the
    model copies.
    """
    rng, length = np.random.default_rng(0), min(length, model.n_positions // 2)
    passages = np.stack([ids[i : i + length] for i in rng.integers(len(ids) - length, size=rows)])
    losses = {}
    for name, first in (("text", passages), ("random", rng.integers(model.config["vocab_size"], size=(rows, length)))):
        repeated = torch.from_numpy(np.concatenate([first, first], axis=1).astype(np.int64)).to(device)
        logits = model.logits(model.hidden_states(repeated[:, :-1], start=0)[:, length:])  # all but its first token
        losses[name] = F.cross_entropy(logits.float().flatten(0, 1), repeated[:, length + 1 :].flatten()).item()
    return losses


def train(args: argparse.Namespace) -> None:
    """Train a new GPT-2 or BART on --tokens of the corpus, or go on with the run that --state holds."""
    keep_freed_memory()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if longest_row(args) > args.positions:
        raise InputError(f"rows of {longest_row(args)} tokens do not fit {args.positions} positions: lower --length")
    args.state.mkdir(parents=True, exist_ok=True)
    if args.what == "bart" and not (args.out / "vocab.json").exists():
        bart_vocabulary(args)
    check_bpe(args.out)
    args.shared = settings(args)
    train_batches, heldout_batches, heldout_ids = load_corpus(args)
    model = new_model(args, load_tokenizer(args.out).vocab_size)
    if args.init:
        start_from(args.init, model)
    model.to(device)
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    model.to(torch.bfloat16)
    optimizers = make_optimizers(masters, args)
    step, log = load_state(args, masters, optimizers)
    copy_weights(model, masters)
    for layer in [*model.encoder.layers, *model.decoder.layers] if model.encoder_decoder else model.h:
        layer.compile()  # one program for all layers of a kind

    tokens_per_step = args.batch_size * args.length
    steps = int(args.tokens) // tokens_per_step
    heldout_batches = [heldout_batches(i) for i in range(max(1, 24 * 24 // args.batch_size))]
    before = log[-1]["seconds"] if log else 0.0  # of the runs that this one goes on from
    started = saved_at = time.time()
    done, first = step / steps, step
    bar = tqdm(initial=step, total=None if args.seconds else steps, unit="step", dynamic_ncols=True)
    steps_ahead = Steps(train_batches, step)
    loader = DataLoader(steps_ahead, batch_size=None, num_workers=args.workers, pin_memory=device == "cuda")
    batches = iter(loader)
    while done < 1:
        lr = learning_rate(args, done)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss = loss_of(model, next(batches), device, backward=True)
        update(model, masters, optimizers)
        step += 1
        if step == first + 4:  # the first steps compile: that is not training time
            started = time.time()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens=f"{step * tokens_per_step / 1e6:.1f}M")
        bar.update()
        seconds = before + time.time() - started
        if not args.seconds:
            done = step / steps
        elif step >= first + 4:
            done = min(1.0, seconds / args.seconds)
        if step % args.eval_every == 0 or done == 1:
            held_out = held_out_loss(model, heldout_batches, device)
            log.append({"tokens": step * tokens_per_step, "loss": loss.item(), "heldout": held_out, "lr": lr,
                        "seconds": round(before + time.time() - started, 1)})  # fmt: skip
            if not model.encoder_decoder:
                log[-1]["copying"] = copying_loss(model, heldout_ids, device)
            bar.write(json.dumps(log[-1]))
        if time.time() - saved_at > args.save_every or done == 1:
            save_state(args, step, log, masters, optimizers)
            export(args, model, masters, log)
            saved_at = time.time()


class Steps(Dataset[Rows]):
    """The batches of a run from step `first` on, for a DataLoader's workers to prepare."""

    def __init__(self, batches: Callable[[int], Rows], first: int):
        self.batches, self.first = batches, first

    def __len__(self) -> int:
        return 2**31 - self.first

    def __getitem__(self, i: int) -> Rows:
        return self.batches(self.first + i)


def longest_row(args: argparse.Namespace) -> int:
    return args.length if args.what == "gpt2" else 2 * args.length


def load_corpus(args: argparse.Namespace) -> tuple[Callable[[int], Rows], Callable[[int], Rows], np.ndarray]:
    """The batches of the training text and of the held-out text by step, and the held-out ids.

    InputError if there is too little text.
    """
    train_ids, heldout_ids = corpus_ids(args, "pretrain"), corpus_ids(args, "heldout")
    if min(len(train_ids), len(heldout_ids)) < 4 * longest_row(args):
        raise InputError(f"{args.corpus} has less text than a few rows: {len(train_ids)} and {len(heldout_ids)} tokens")
    batches = language_modelling if args.what == "gpt2" else denoising
    return batches(args, train_ids, args.seed), batches(args, heldout_ids, args.seed), heldout_ids


def update(model: Model, masters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """One optimiser step on the masters from the model's bf16 gradients."""
    for name, p in model.named_parameters():
        masters[name].grad, p.grad = p.grad.float(), None
    torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    copy_weights(model, masters)


@torch.no_grad()
def copy_weights(model: Model, masters: dict[str, Tensor]) -> None:
    torch._foreach_copy_(list(model.parameters()), list(masters.values()))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run must share: `step` and the rows would mean something else otherwise.

    To be called once: it reads the whole corpus.
    """
    keys = ("what", "layers", "width", "heads", "positions", "length", "batch_size", "seed")
    files = {"vocabulary": vocabulary_digest(args.out), "corpus": digest(corpus_file(args, "pretrain"))}
    return {**{key: getattr(args, key) for key in keys}, **files}


def load_state(
    args: argparse.Namespace, masters: dict[str, Tensor], optimizers: list[torch.optim.Optimizer]
) -> tuple[int, list[dict[str, Any]]]:
    """The step and the log of the run in --state, whose weights and optimisers are put back; 0 and [] for a new run."""
    if not (args.state / "state.pt").exists():
        return 0, []
    state = read_checkpoint(args.state / "state.pt", args.shared)
    with torch.no_grad():
        for name, p in masters.items():
            p.copy_(state["masters"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["log"]


def save_state(
    args: argparse.Namespace, step: int, log: list[dict[str, Any]], masters: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
) -> None:  # fmt: skip
    state = {"settings": args.shared, "step": step, "log": log,
             "masters": {n: p.detach() for n, p in masters.items()},
             "optimizers": [o.state_dict() for o in optimizers]}  # fmt: skip
    with atomic_write(args.state / "state.pt", "wb") as file:
        torch.save(state, file)


def export(args: argparse.Namespace, model: Model, masters: dict[str, Tensor], log: list[dict[str, Any]]) -> None:
    """The HuggingFace folder in float16, and the log of held-out losses beside it."""
    half = type(model)(model.config).half()
    half.load_state_dict({**half.state_dict(), **masters})
    save_model(half, args.out)
    write_jsonl(args.out / "pretraining.jsonl", log)


def parse_args() -> argparse.Namespace:
    parser = Parser("python weights/pretrain.py", __doc__, what="WHAT")
    parser.add_argument("what", choices=["bpe", "gpt2", "bart"], metavar="WHAT", help="bpe, gpt2 or bart")

    add = parser.add_argument_group("from where to where").add_argument
    add("--corpus", type=Path, required=True, metavar="FOLDER", help="with pretrain.txt.xz and heldout.txt.xz (needed)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="of the model, NAME, to be written (needed)")
    add("--state", type=Path, metavar="FOLDER", help="of checkpoint and encoded corpus (runs/pretrain-NAME)")
    add("--init", metavar="MODEL", help="a trained model of the same shape to start from (random weights)")

    add = parser.add_argument_group("the vocabulary").add_argument
    add("--vocab-size", type=int, metavar="N", default=4096, help="bpe: how many tokens (%(default)s)")
    add("--bpe", type=Path, metavar="FOLDER", help="bart: a folder whose BPE the new model shall have")

    add = parser.add_argument_group("the model's shape").add_argument
    add("--layers", type=int, metavar="N", help="gpt2: how many (6); bart: in encoder and decoder each (4)")
    add("--width", type=int, metavar="N", default=256, help="numbers in a token's state (%(default)s)")
    add("--heads", type=int, metavar="N", default=4, help="attention heads in a layer (%(default)s)")
    add("--positions", type=int, metavar="N", default=512, help="the longest sequence (%(default)s)")

    add = parser.add_argument_group("how it is trained").add_argument
    add("--tokens", type=float, metavar="N", default=60e6, help="how many in all, then it ends (%(default)g)")
    add("--seconds", type=float, metavar="X", help="train this long, instead of --tokens")
    add("--copies", type=float, metavar="X", default=0.1, help="gpt2: rows with a half repeated (%(default)s)")
    add("--workers", type=int, metavar="N", default=0, help="processes that prepare batches (%(default)s)")
    add("--length", type=int, metavar="N", default=256, help="tokens in a row (%(default)s)")
    add("--batch-size", type=int, metavar="N", default=24, help="rows in a step (%(default)s)")
    add("--lr", type=float, metavar="X", default=3e-3, help="learning rate between warm-up and decay (%(default)s)")
    add("--decay", type=float, metavar="X", default=0.3, help="share of the tokens over which it decays (%(default)s)")
    add("--eval-every", type=int, metavar="N", default=250, help="steps between held-out losses (%(default)s)")
    add("--save-every", type=int, metavar="N", default=300, help="seconds between checkpoints (%(default)s)")
    add("--seed", type=int, metavar="N", default=0, help="of the first weights and the order (%(default)s)")

    args = parser.parse_args()
    sizes = ("vocab_size", "layers", "width", "heads", "positions", "length", "batch_size", "eval_every")
    check_above_zero(args, (*sizes, "tokens", "lr", "decay"))
    check_not_negative(args, ("save_every", "seed"))
    if args.vocab_size > 2**16:
        raise InputError(f"--vocab-size is {args.vocab_size}: the encoded corpus has room for {2**16} (uint16)")
    fill_defaults(args, {"layers": 6 if args.what == "gpt2" else 4, "state": Path("runs", f"pretrain-{args.out.name}")})
    return args


def main() -> None:
    args = parse_args()
    if args.what == "bpe":
        train_bpe(args)
    else:
        train(args)


if __name__ == "__main__":
    run_main(main)
