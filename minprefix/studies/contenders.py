"""The contenders of `bench`: minprefix and transformers + PEFT at the same work, and what that work comes to."""

import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minprefix.core.batches import Group, collate, loss_scale, make_batch, pad
from minprefix.core.cuda_graphs import training_graphs
from minprefix.core.encode import encode_pairs, start_id
from minprefix.core.generate import generate_ids
from minprefix.core.kernels import Linear, compile_layers, pack_weights
from minprefix.core.loss import target_loss
from minprefix.core.model import Model
from minprefix.core.prefix import Prefix
from minprefix.core.training import batch_stream, make_optimizer, training_step
from minprefix.data.tasks import Example, load_examples
from minprefix.formats.hub import resolve_model
from minprefix.formats.load import load_model
from minprefix.formats.tokenizer import Tokenizer, load_tokenizer
from minprefix.system.device import keep_freed_memory, pick_dtype
from minprefix.system.errors import InputError

Work = tuple[Callable[[int], None], dict[str, Any]]  # what does batch i (or writes all texts), and facts for `row`


def ours(args: Namespace) -> Work:
    """minprefix: the steps and the search of train.py and sample.py; BART has a prefix at all three sites."""
    keep_freed_memory()
    model, tokenizer, batches = shared(args)
    facts = facts_of(args, model, tokenizer, batches, model.prefix_sites)
    prefix = Prefix(model, args.prefix_length, args.hidden).to(args.device)
    optimizer, folded = make_optimizer(prefix, lr=8e-5), prefix.fold()
    pack_weights(model, training=args.what == "train")  # for good: the scripts, too, do this once for all of their work
    if args.compile:
        compile_layers(model)
    start, count = start_id(model, tokenizer), args.new_tokens

    graphs = training_graphs(model, prefix) if args.what == "train" else None

    def train(i: int) -> None:
        batch = make_batch(batches[i], tokenizer, model, prefix.position_offset)
        training_step(model, prefix, [batch], optimizer, loss_scale(model, batches[i]), graphs)

    def write(_: int) -> None:
        sources = [source for batch in batches for source, _ in batch]
        generate_ids(model, sources, start, tokenizer.end_id, folded, beams=args.beams, max_new_tokens=count,
                     min_new_tokens=count, batch_size=args.batch_size)  # fmt: skip

    if args.what == "train":
        return train, facts
    return write, facts


def peer(args: Namespace) -> Work:
    """transformers + PEFT with the same pairs, the same MLP or none; BART has a prefix at the decoder only, PEFT's way.

    The batches are random ones of a row for each pair: to put rows of like length together, or several targets into a
    row, is minprefix's doing.
    """
    try:
        import transformers
        from peft import PrefixTuningConfig, get_peft_model
    except ImportError as error:
        raise InputError(f"--peer needs transformers and PEFT: pip install -e '.[parity]' ({error})") from error
    model, tokenizer, groups = shared(args)
    pairs = [(source, target) for source, targets in chain(*groups) for target in targets]
    facts = facts_of(args, model, tokenizer, [[(source, [target]) for source, target in pairs]], ["decoder"])
    decoder_only, folder = not model.encoder_decoder, resolve_model(args.model)
    del model
    random.Random(0).shuffle(pairs)
    batches = [pairs[i : i + args.batch_size] for i in range(0, len(pairs), args.batch_size)]
    kind = transformers.GPT2LMHeadModel if decoder_only else transformers.BartForConditionalGeneration
    base = kind.from_pretrained(folder, dtype=pick_dtype(args.dtype, args.device))
    base.config.pad_token_id = tokenizer.pad_id
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM" if decoder_only else "SEQ_2_SEQ_LM", num_virtual_tokens=args.prefix_length,
        prefix_projection=args.hidden > 0, encoder_hidden_size=args.hidden,
    )  # fmt: skip
    trainable = get_peft_model(base, config).to(args.device)

    def tensors(rows: Iterable[list[int]], padding: int, left: bool = False) -> Tensor:
        padded = pad([row[::-1] for row in rows], padding).flip(1) if left else pad(list(rows), padding)
        return padded.to(args.device)

    def train(i: int) -> None:
        sources, targets = zip(*batches[i], strict=True)
        read = [s + t for s, t in batches[i]] if decoder_only else sources
        labels = [[-100] * len(s) + t for s, t in batches[i]] if decoder_only else targets
        mask = tensors([[1] * len(row) for row in read], 0)
        inputs = {"input_ids": tensors(read, tokenizer.pad_id), "attention_mask": mask, "labels": tensors(labels, -100)}
        trainable(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def write(_: int) -> None:
        for batch in batches:
            sources = [source + [tokenizer.end_id] * decoder_only for source, _ in batch]
            peer_generate(
                trainable, tensors(sources, tokenizer.pad_id, left=decoder_only),
                tensors([[1] * len(source) for source in sources], 0, left=decoder_only), num_beams=args.beams,
                min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens, pad_token_id=tokenizer.pad_id,
                no_repeat_ngram_size=0, early_stopping=False, length_penalty=1.0,  # whatever config.json says
            )  # fmt: skip

    if args.what == "generate":
        trainable.eval()
        return write, facts
    optimizer = torch.optim.AdamW([p for p in trainable.parameters() if p.requires_grad], lr=8e-5, fused=True)
    return train, facts


def peer_generate(peft_model: Any, ids: Tensor, mask: Tensor, num_beams: int, **options: Any) -> Tensor:
    """The ids (B, N) that transformers writes with a PEFT prefix for the sources ids (B, S) with their mask (B, S)."""
    cache = peft_model.get_prompt(len(ids) * num_beams)
    if not peft_model.config.is_encoder_decoder:
        mask = F.pad(mask, (cache.get_seq_length(), 0), value=1)
    return peft_model.get_base_model().generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, num_beams=num_beams, do_sample=False, **options
    )


def shared(args: Namespace) -> tuple[Model, Tokenizer, list[list[Group]]]:
    """The model, the tokeniser, and the batches of one round: the same pairs for both contenders."""
    model = load_model(args.model, args.device, pick_dtype(args.dtype, args.device))
    tokenizer = load_tokenizer(args.model)
    examples = load_examples("e2e", "train" if args.what == "train" else "test", args.data)
    group = 1 if args.what == "generate" or args.source_length else args.group
    examples = random.Random(0).sample(examples, min(len(examples), 20 * args.batch_size * args.steps // group))
    if group == 1:
        examples = [Example(e.source, e.references[:1]) for e in examples]
    pairs = encode_pairs(examples, tokenizer, model, what=None)
    pairs = pairs[: len(pairs) // args.batch_size * args.batch_size]  # full batches only
    if not pairs:
        raise InputError(f"there are {len(examples)} inputs, too few for --batch-size {args.batch_size}: lower it")
    if args.source_length:
        sources = torch.randint(5, min(tokenizer.vocab_size - 5, 4000), (len(pairs), args.source_length)).tolist()
        pairs = [(source, target) for source, (_, target) in zip(sources, pairs, strict=True)]
    batches = batch_stream(pairs, args.batch_size, 0, 0, model.encoder_decoder, group)
    return model, tokenizer, list(islice(batches, args.steps))


def facts_of(
    args: Namespace, model: Model, tokenizer: Tokenizer, batches: list[list[Group]], sites: Iterable[str]
) -> dict[str, Any]:
    """What a round is: tokens (read in training, padding not counted; else written), and the work that they need."""
    if args.what == "generate":
        return {"tokens": args.steps * args.batch_size * args.new_tokens, "bytes": bytes_of_a_step(model)}
    flop = useful_flop(model, tokenizer, chain(*batches), args.prefix_length, sites)
    tokens = sum(len(source) + sum(map(len, targets)) for source, targets in chain(*batches))
    return {"tokens": tokens, "flop": flop}


def useful_flop(model: Model, tokenizer: Tokenizer, groups: Iterable[Group], length: int, sites: Iterable[str]) -> int:
    """Floating-point operations of all matrix products that training on groups needs: each row by itself, unpadded.

    As torch counts them, forward and backward, for a frozen model with a prefix of this length at these sites; the
    prefix's MLP is left out. They are counted for six rows; those of S source and T target tokens are a quadratic
    function of S and T, all but exactly (rows of less than 16 tokens may take one product more).
    """
    with torch.device("meta"):  # shapes alone, nothing is computed
        shapes = type(model)(model.config).requires_grad_(False)
        shapes.n_positions = sys.maxsize  # a row of several targets may be longer than any of its pairs
        prefix = {site: torch.zeros(L, 2, H, length, D, requires_grad=True)
                  for site, (L, H, D) in model.prefix_sites.items() if site in sites}  # fmt: skip
    counted, probes = [], [(20, 20), (20, 40), (40, 20), (40, 40), (60, 20), (20, 60)]
    for S, T in probes:
        with FlopCounterMode(display=False) as counter:
            batch = collate([([5] * S, [[5] * T])], tokenizer, shapes).to("meta")
            target_loss(shapes, batch, prefix).backward()
        counted.append(counter.get_total_flops())
    coefficients = np.linalg.solve(np.array([quadratic(*probe) for probe in probes]), np.array(counted, dtype=float))
    lengths = [(len(source), sum(map(len, targets))) for source, targets in groups]
    return round(sum(float(coefficients @ quadratic(S, T)) for S, T in lengths))


def quadratic(S: int, T: int) -> list[int]:
    return [1, S, T, S * S, S * T, T * T]


def bytes_of_a_step(model: Model) -> int:
    """Bytes of the weights that decoding reads for each new token: the decoder's matrices and the head."""
    layers = model.decoder.layers if model.encoder_decoder else model.h
    matrices = {layer.weight for layer in layers.modules() if isinstance(layer, Linear)} | {model.head.weight}
    return sum(w.numel() * w.itemsize for w in matrices)


def machine(args: Namespace) -> tuple[float, float]:
    """What this machine can do: operations per second of a large matrix product, bytes per second read."""
    n = 4096 if args.device == "cuda" else 2048  # large enough for the full rate
    a = torch.randn(n, n, device=args.device).to(pick_dtype(args.dtype, args.device))
    large = torch.empty(2**28, dtype=torch.uint8, device=args.device).fill_(1).view(torch.int64)
    product = min(seconds_of(args.device, torch.matmul, a, a) for _ in range(5))
    reading = min(seconds_of(args.device, large.sum) for _ in range(5))
    return 2 * n**3 / product, 2**28 / reading


def seconds_of(device: str, function: Callable[..., object], *args: object) -> float:
    started = time.perf_counter()
    function(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started
