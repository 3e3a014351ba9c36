"""Speed and memory on E2E inputs, next to transformers + PEFT on the same work.

    python -m minprefix bench train    --model gpt2/ --peer
    python -m minprefix bench generate --model gpt2/ --peer --beams 5 --new-tokens 32
    python -m minprefix bench train    --model bart-base/ --source-length 512 --sweep prefix-length 1 50 200

Each contender has a process of its own, so that its peak memory is its own; they take turns, round by round, and the
other waits. A round is --steps batches, the same in each round; a first round to warm up does not count. Reported are
the median of a batch, and speeds in the median round; compile_s is what torch.compile took in all, recompiles are the
programs that it made after the first round.

PEFT's `generate` leaves the prefix out (peft 0.21.2 with transformers 5.24.0), so that the peer's texts are written by
the base model's `generate`, to which the adapter's keys and values are given as a cache.

In training minprefix reads an input of E2E once for several of its references (--group), the peer once for each, as it
does; both are given the same pairs, and examples_per_s counts pairs. tokens_per_s and the operations of TFLOP_per_s are
those that each contender needs for them.
"""

import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import calculate_time_spent, counters  # no public interface gives these
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minprefix.cli.options import Parser, add_device_options, check_above_zero, check_not_negative, flag
from minprefix.core.batches import Group, collate, encode_pairs, pad, start_id
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
from minprefix.system.device import keep_freed_memory, pick_device, pick_dtype
from minprefix.system.errors import InputError

FIGURES = ("who", "examples_per_s", "median_s", "first_s", "compile_s", "recompiles", "tokens_per_s", "TFLOP_per_s",
           "share_of_matmul", "share_of_bandwidth", "peak_GiB")  # fmt: skip
Work = tuple[Callable[[int], None], dict[str, Any]]  # what does batch i, and facts for `row`


def parse_args() -> Namespace:
    parser = Parser("python -m minprefix bench", __doc__, what="WHAT")
    add = parser.add_argument
    add("what", choices=("train", "generate"), metavar="WHAT", help="train, generate")
    add("--model", default="gpt2-mini", help="a HuggingFace folder or a model's name (%(default)s)")
    add("--data", metavar="FOLDER", help="of E2E's files (as train.py)")
    add("--batch-size", type=int, metavar="N", default=10, help="pairs or inputs at a time (%(default)s)")
    add("--group", type=int, metavar="N", default=8, help="references that may share a row in training (%(default)s)")
    add("--prefix-length", type=int, metavar="N", default=5, help="virtual tokens (%(default)s)")
    add("--hidden", type=int, metavar="N", default=512, help="width of the MLP in training, 0: none (%(default)s)")
    add("--source-length", type=int, metavar="N", help="random sources of N tokens (E2E's own)")
    add("--beams", type=int, metavar="K", default=5, help="of the beam search (%(default)s)")
    add("--new-tokens", type=int, metavar="N", default=32, help="of every text, none ends before (%(default)s)")
    add("--steps", type=int, metavar="N", default=8, help="batches in a round (%(default)s)")
    add("--rounds", type=int, metavar="N", default=3, help="rounds after the first (%(default)s)")
    add("--threads", type=int, metavar="N", help="of the CPU (torch's default)")
    add_device_options(parser)
    add("--compile", choices=("auto", "on", "off"), metavar="WHEN", default="auto",
        help="on CUDA, compile minprefix's layers: on, off, or in training (%(default)s)")  # fmt: skip
    add("--peer", action="store_true", help="transformers + PEFT as well (pip install -e '.[parity]')")
    add("--sweep", nargs="+", metavar=("OPTION", "N"), help="measure for each value of an option: beams 1 5 10")
    add("--json", action="store_true", help="print JSON lines only, minprefix's own the last")
    args = parser.parse_args()
    numbers = ("batch_size", "prefix_length", "beams", "new_tokens", "steps", "rounds", "threads", "source_length")
    check_above_zero(args, (*numbers, "group"))
    check_not_negative(args, ("hidden",))
    if args.peer and not all(find_spec(name) for name in ("transformers", "peft")):  # before the first is measured
        raise InputError("--peer needs transformers and PEFT: pip install -e '.[parity]'")
    args.device = pick_device(args.device)
    args.dtype = str(pick_dtype(args.dtype, args.device)).removeprefix("torch.")
    return args


def main() -> None:
    args = parse_args()
    for settings in sweep(args):
        rows = measure(settings)
        if args.json:
            for row in reversed(rows):  # minprefix's last
                print(json.dumps(row), flush=True)
        else:
            print_table(rows, settings)


def sweep(args: Namespace) -> list[Namespace]:
    """The settings to measure: those of the command line, for each value of the swept option."""
    if args.sweep is None:
        return [args]
    key, values = args.sweep[0].lstrip("-").replace("-", "_"), args.sweep[1:]
    numbers = [key for key, value in vars(args).items() if type(value) is int] + ["source_length"]
    fits = all(value.isdecimal() and (int(value) > 0 or key == "hidden") for value in values)
    if key not in numbers or not values or not fits:
        known = ", ".join(map(flag, numbers))
        raise InputError(f"--sweep {' '.join(args.sweep)}: name one of {known}, then numbers above 0 (hidden: also 0)")
    return [Namespace(**{**vars(args), key: int(value)}) for value in values]


def measure(args: Namespace) -> list[dict[str, Any]]:
    """Rows of results, minprefix's first."""
    contenders = {"minprefix": ours, **({"transformers + PEFT": peer} if args.peer else {})}
    context = multiprocessing.get_context("spawn")
    workers, processes = {}, []
    for who, contender in contenders.items():
        workers[who], there = context.Pipe()
        processes.append(context.Process(target=work, args=(there, contender, args), daemon=True))
        processes[-1].start()
        there.close()
        ask(workers[who], None)  # it is set up before the next one starts
    seconds: dict[str, list[list[float]]] = {who: [] for who in workers}
    for _ in range(args.rounds + 1):
        for who, worker in workers.items():
            seconds[who].append(ask(worker, "round"))
    facts = {who: ask(worker, "end") for who, worker in workers.items()}
    for process in processes:
        process.join()
    best = {key: max(known[key] for known in facts.values()) for key in ("matmul", "bandwidth")}
    return [{"what": args.what, "who": who, **row(args, {**facts[who], **best}, *seconds[who])} for who in workers]


def ask(worker: Connection, request: str | None) -> Any:
    """A worker's answer; InputError with its reason if it could not work."""
    if request:
        worker.send(request)
    try:
        answer = worker.recv()
    except EOFError:
        raise InputError("a measuring process ended early: its message is above (too little memory?)") from None
    if isinstance(answer, str):
        raise InputError(answer)
    return answer


def work(pipe: Connection, contender: Callable[[Namespace], Work], args: Namespace) -> None:
    """A contender's process: set up, then for each request a round's seconds, at the end what else is known."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        do_batch, facts = contender(args)
        pipe.send(True)
        programs = []  # that torch.compile has made, after each round
        while pipe.recv() == "round":
            pipe.send([seconds_of(args.device, do_batch, i) for i in range(args.steps)])
            programs.append(counters["frames"]["ok"])
    except InputError as error:
        pipe.send(str(error))
        return
    except EOFError:  # the other contender failed
        return
    facts["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if args.device == "cuda":
        facts["peak"] = torch.cuda.max_memory_allocated()
    facts |= {"compile_s": calculate_time_spent()["total_wall_time"], "recompiles": programs[-1] - programs[0]}
    facts["matmul"], facts["bandwidth"] = machine(args)
    pipe.send(facts)


def seconds_of(device: str, function: Callable[..., object], *args: object) -> float:
    started = time.perf_counter()
    function(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - started


def row(args: Namespace, facts: dict[str, Any], first: list[float], *rounds: list[float]) -> dict[str, Any]:
    """The figures of one contender, from the seconds of each batch in the first round and in those that count."""
    times = [t for times in rounds for t in times]
    total = statistics.median(sum(times) for times in rounds)
    figures = {
        "examples_per_s": round(args.batch_size * args.steps / total, 3),
        "median_s": round(statistics.median(times), 5),
        "first_s": round(first[0], 3),
        "compile_s": round(facts["compile_s"], 3),
        "recompiles": facts["recompiles"],
        "tokens_per_s": round(facts["tokens"] / total, 1),
    }
    if args.what == "train":
        speed = facts["flop"] / total
        figures |= {"TFLOP_per_s": round(speed / 1e12, 3), "share_of_matmul": round(speed / facts["matmul"], 3)}
    else:
        speed = facts["bytes"] * args.new_tokens * args.steps / total
        figures |= {"share_of_bandwidth": round(speed / facts["bandwidth"], 3)}
    settings = {key: value for key, value in vars(args).items() if key not in ("what", "sweep", "json", "peer")}
    return {**figures, "peak_GiB": round(facts["peak"] / 2**30, 2), "settings": settings}


def print_table(rows: list[dict[str, Any]], args: Namespace) -> None:
    swept = f", {args.sweep[0]} {getattr(args, args.sweep[0].replace('-', '_'))}" if args.sweep else ""
    print(f"\n{args.what} {args.model}, {args.dtype} on {args.device}, batch {args.batch_size}{swept}")
    for name in FIGURES:
        if name in rows[0]:
            print(f"  {name:<20}" + "".join(f"{row[name]!s:>22}" for row in rows))
    if args.what == "train" and not args.source_length:
        print(f"  examples are pairs; minprefix reads an input once for up to {args.group} of its references (--group)"
              + (", the peer once for each" if len(rows) > 1 else ""))  # fmt: skip
    if len(rows) > 1:
        speed, memory = (rows[0][key] / rows[1][key] for key in ("examples_per_s", "peak_GiB"))
        print(f"  minprefix / peer: {speed:.2f} times the examples per second, {memory:.2f} of the memory")


# ---- the work: each contender gives what does batch i, and facts for `row` ----


def ours(args: Namespace) -> Work:
    """minprefix: the steps and the search of train.py and sample.py; BART has a prefix at all three sites."""
    keep_freed_memory()
    model, tokenizer, batches = shared(args)
    facts = facts_of(args, model, tokenizer, batches, model.prefix_sites)
    prefix = Prefix(model, args.prefix_length, args.hidden).to(args.device)
    optimizer, folded = make_optimizer(prefix, lr=8e-5), prefix.fold()
    pack_weights(model, training=args.what == "train")  # for good: the scripts, too, do this once for all of their work
    if args.compile == "on" or (args.compile == "auto" and args.what == "train"):
        compile_layers(model)
    start, count = start_id(model, tokenizer), args.new_tokens

    def train(i: int) -> None:
        batch = collate(batches[i], tokenizer, model).to(args.device)
        training_step(model, prefix, [batch], optimizer)

    def write(i: int) -> None:
        sources = [source for source, _ in batches[i]]
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
    def write(i: int) -> None:
        sources = [source + [tokenizer.end_id] * decoder_only for source, _ in batches[i]]
        peer_generate(
            trainable, tensors(sources, tokenizer.pad_id, left=decoder_only),
            tensors([[1] * len(source) for source in sources], 0, left=decoder_only), num_beams=args.beams,
            min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens, pad_token_id=tokenizer.pad_id,
            no_repeat_ngram_size=0, early_stopping=False, length_penalty=1.0,  # whatever the folder's config.json says
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
    prefix's MLP is left out.
    """
    with torch.device("meta"):  # shapes alone, nothing is computed
        shapes = type(model)(model.config).requires_grad_(False)
        shapes.n_positions = sys.maxsize  # a row of several targets may be longer than any of its pairs
        prefix = {site: torch.zeros(L, 2, H, length, D, requires_grad=True)
                  for site, (L, H, D) in model.prefix_sites.items() if site in sites}  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        for group in groups:
            target_loss(shapes, collate([group], tokenizer, shapes).to("meta"), prefix).backward()
    return counter.get_total_flops()


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
