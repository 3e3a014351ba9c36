"""Speed and memory on E2E inputs, next to transformers + PEFT on the same work.

    python -m minprefix bench train    --model gpt2/ --peer
    python -m minprefix bench generate --model gpt2/ --peer --beams 5 --new-tokens 32
    python -m minprefix bench train    --model bart-base/ --source-length 512 --sweep prefix-length 1 50 200
    python -m minprefix bench report   --minutes 8 --peer    all of it, on models of random weights (report --help)

Each contender has a process of its own, so that its peak memory is its own; they take turns, round by round, and the
other waits. A round is --steps batches, the same in each round; a first round to warm up does not count. Texts are
written by one call a round, so that its batches have the same mean time. Reported are
the median of a batch, and speeds in the median round; compile_s is what torch.compile took in all, recompiles are the
programs that it made after the first round.

PEFT's `generate` leaves the prefix out (peft 0.21.2 with transformers 5.24.0), so that the peer's texts are written by
the base model's `generate`, to which the adapter's keys and values are given as a cache.

With --group, minprefix reads an input of E2E once for several of its references in training, the peer once for each;
both are given the same pairs, and examples_per_s counts pairs. tokens_per_s and the operations of TFLOP_per_s are those
that each contender needs for them.
"""

import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._dynamo.utils import calculate_time_spent, counters  # no public interface gives these

from minprefix.cli.options import Parser, add_device_options, check_above_zero, check_not_negative, flag
from minprefix.studies.contenders import Work, machine, ours, peer, seconds_of
from minprefix.system.device import pick_device, pick_dtype
from minprefix.system.errors import InputError

FIGURES = ("who", "examples_per_s", "median_s", "first_s", "compile_s", "recompiles", "tokens_per_s", "TFLOP_per_s",
           "share_of_matmul", "share_of_bandwidth", "peak_GiB")  # fmt: skip


def make_parser() -> Parser:
    parser = Parser("python -m minprefix bench", __doc__, what="WHAT")
    add = parser.add_argument
    add("what", choices=("train", "generate"), metavar="WHAT", help="train, generate")
    add("--model", default="gpt2-mini", help="a HuggingFace folder or a model's name (%(default)s)")
    add("--data", metavar="FOLDER", help="of E2E's files (as train.py)")
    add("--batch-size", type=int, metavar="N", default=10, help="pairs or inputs at a time (%(default)s)")
    add("--group", type=int, metavar="N", default=1, help="references that may share a row in training (%(default)s)")
    add("--prefix-length", type=int, metavar="N", default=5, help="virtual tokens (%(default)s)")
    add("--hidden", type=int, metavar="N", default=512, help="width of the MLP in training, 0: none (%(default)s)")
    add("--source-length", type=int, metavar="N", help="random sources of N tokens (E2E's own)")
    add("--beams", type=int, metavar="K", default=5, help="of the beam search (%(default)s)")
    add("--new-tokens", type=int, metavar="N", default=32, help="of every text, none ends before (%(default)s)")
    add("--steps", type=int, metavar="N", default=8, help="batches in a round (%(default)s)")
    add("--rounds", type=int, metavar="N", default=3, help="rounds after the first (%(default)s)")
    add("--threads", type=int, metavar="N", help="of the CPU (torch's default)")
    add_device_options(parser)
    add("--compile", action="store_true", help="on CUDA, compile minprefix's layers")
    add("--peer", action="store_true", help="transformers + PEFT as well (pip install -e '.[parity]')")
    add("--sweep", nargs="+", metavar=("OPTION", "N"), help="measure for each value of an option: beams 1 5 10")
    add("--json", action="store_true", help="print JSON lines only, minprefix's own the last")
    return parser


def parse_args() -> Namespace:
    args = make_parser().parse_args()
    check(args)
    return args


def check(args: Namespace) -> None:
    """InputError where an option makes no sense; device and dtype are filled in."""
    numbers = ("batch_size", "prefix_length", "beams", "new_tokens", "steps", "rounds", "threads", "source_length")
    check_above_zero(args, (*numbers, "group"))
    check_not_negative(args, ("hidden",))
    if args.peer and not all(find_spec(name) for name in ("transformers", "peft")):  # before the first is measured
        raise InputError("--peer needs transformers and PEFT: pip install -e '.[parity]'")
    args.device = pick_device(args.device)
    args.dtype = str(pick_dtype(args.dtype, args.device)).removeprefix("torch.")


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


def measure(args: Namespace, deadline: float = math.inf) -> list[dict[str, Any]]:
    """Rows of results, minprefix's first.

    deadline: of time.monotonic(); fewer rounds are made if not all can be, InputError if there is no time for two.
    """
    contenders = {"minprefix": ours, **({"transformers + PEFT": peer} if args.peer else {})}
    context = multiprocessing.get_context("spawn")
    workers, processes = {}, []
    try:
        for who, contender in contenders.items():
            workers[who], there = context.Pipe()
            processes.append(context.Process(target=work, args=(there, contender, args), daemon=True))
            processes[-1].start()
            there.close()
            ask(workers[who], None, deadline)  # it is set up before the next one starts
        seconds: dict[str, list[list[float]]] = {who: [] for who in workers}
        took = 0.0  # by the last round
        for number in range(args.rounds + 1):
            started = time.monotonic()
            if number > 1 and started + 1.5 * took > deadline:
                break
            for who, worker in workers.items():
                seconds[who].append(ask(worker, "round", deadline))
            took = time.monotonic() - started
        facts = {who: ask(worker, "end", deadline) for who, worker in workers.items()}
    finally:
        for worker, process in zip(workers.values(), processes, strict=False):
            worker.close()  # which ends a process that waits for a request
            process.join(10 if time.monotonic() < deadline else 0)
            process.terminate()
            process.join()
    best = {key: max(known[key] for known in facts.values()) for key in ("matmul", "bandwidth")}
    return [{"what": args.what, "who": who, **row(args, {**facts[who], **best}, *seconds[who])} for who in workers]


def ask(worker: Connection, request: str | None, deadline: float = math.inf) -> Any:
    """A worker's answer; InputError with its reason if it could not work, or has none by the deadline."""
    if request:
        worker.send(request)
    try:
        if not worker.poll(None if deadline == math.inf else max(0.0, deadline - time.monotonic())):
            raise InputError("it was not measured in the time that there was")
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
            if args.what == "train":
                pipe.send([seconds_of(args.device, do_batch, i) for i in range(args.steps)])
            else:  # the batches are one call's
                pipe.send([seconds_of(args.device, do_batch, 0) / args.steps] * args.steps)
            programs.append(counters["frames"]["ok"])
    except InputError as error:
        pipe.send(str(error))
        return
    except EOFError:  # the other contender failed
        return
    facts["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if args.device == "cuda":
        facts["peak"] = torch.cuda.max_memory_reserved()
    facts |= {"compile_s": calculate_time_spent()["total_wall_time"], "recompiles": programs[-1] - programs[0]}
    facts["matmul"], facts["bandwidth"] = machine(args)
    pipe.send(facts)


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
    if args.what == "train" and args.group > 1 and not args.source_length:
        print(f"  examples are pairs; minprefix reads an input once for up to {args.group} of its references (--group)"
              + (", the peer once for each" if len(rows) > 1 else ""))  # fmt: skip
    if len(rows) > 1:
        speed, memory = (rows[0][key] / rows[1][key] for key in ("examples_per_s", "peak_GiB"))
        print(f"  minprefix / peer: {speed:.2f} times the examples per second, {memory:.2f} of the memory")
