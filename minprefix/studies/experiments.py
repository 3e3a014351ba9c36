"""The paper's studies by one command each: training and scoring side by side, a table, a figure.

    python -m minprefix study full --data e2e/              every method on all of the data (tables 1 and 2)
    python -m minprefix study low-data --data e2e/          prefix-tuning and fine-tuning on 50 to 500 examples
    python -m minprefix study length --data e2e/ --dry-run  what would be run, and how long it would take here

Each run is a call of train.py and of sample.py, in a folder OUT/STUDY/RUN; a row of OUT/STUDY/rows.jsonl says that it
is done. The same command again goes on where it stopped, and writes OUT/STUDY/table.md.
"""

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from minprefix.cli.options import Parser, check_above_zero, check_not_negative
from minprefix.cli.runs import check_out
from minprefix.cli.search import recipe
from minprefix.cli.settings import STUDY_STEPS, default_settings
from minprefix.core.batches import batches_per_epoch, loss_scale, make_batch, pair_count
from minprefix.core.cuda_graphs import training_graphs
from minprefix.core.encode import encode_pairs
from minprefix.core.generate import generate
from minprefix.core.kernels import packed_weights
from minprefix.core.prefix import Prefix
from minprefix.core.training import DIVERGED, batch_stream, make_optimizer, training_step
from minprefix.data.rows import json_rows
from minprefix.data.tasks import TASKS, find_e2e, load_examples, load_on_topics
from minprefix.formats.hub import model_name, resolve_model
from minprefix.formats.load import empty_model, load_model
from minprefix.formats.safetensors import read_config
from minprefix.formats.tokenizer import load_tokenizer
from minprefix.methods.baselines import Adapters
from minprefix.studies.report import Row, draw, table
from minprefix.studies.studies import METHODS, SEEN, STUDIES, TUNED, Run, test_sets, tuning
from minprefix.system import signals
from minprefix.system.device import keep_freed_memory, pick_device, pick_dtype
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write, locked, read_json, write_jsonl

SCRIPTS = Path(__file__).resolve().parents[2]  # the repository, where train.py and sample.py are
TRAINED = "trained.json"  # in a run's folder: the arguments with which train.py has finished it
START = 20  # seconds that the programs take to start, to read the data and to compile
Rates = dict[str, dict[str, float | None]]  # method -> {learning rate: dev loss}


def parse_args() -> Namespace:
    parser = Parser("python -m minprefix study", __doc__, what="STUDY")
    add = parser.add_argument
    steps = ", ".join(f"{name} {steps}" for name, steps in STUDY_STEPS.items())
    add("study", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    add("--model", default="gpt2-mini", help="a HuggingFace GPT-2 or BART folder, or a name (%(default)s)")
    add("--task", choices=TASKS, metavar="TASK", help="e2e, ... (e2e; BART scitldr; extrapolation webnlg)")
    add("--data", metavar="FOLDER", help="of the task's files (e2e: data/e2e)")
    add("--steps", type=int, metavar="N", help=f"of a run on all data ({steps}, else by epochs)")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="one run for each (101 102; in low data 101)")
    add("--samplings", type=int, metavar="N", default=5, help="samples of a size, in low-data and init (%(default)s)")
    add("--limit-test", type=int, metavar="N", help="score the first N test inputs only")
    add("--out", type=Path, metavar="FOLDER", help="for all that is written (runs/studies-MODEL)")
    add("--jobs", type=int, metavar="N", help="runs at a time (one for each CPU core; 1 on a GPU)")
    add("--dry-run", action="store_true", help="print the commands and their time, then stop")
    args = parser.parse_args()
    check_above_zero(args, ("steps", "samplings", "limit_test", "jobs"))
    check_not_negative(args, ("seeds",))
    check_out(args.out)
    resolve_defaults(args)
    return args


def resolve_defaults(args: Namespace) -> None:
    """Set what the command line leaves open, and what the model, the data and the machine determine."""
    folder = resolve_model(args.model)
    args.model, args.kind = model_name(folder) or args.model, str(read_config(folder).get("model_type"))
    bart = args.kind == "bart"
    if args.study == "extrapolation" and args.task not in (None, "webnlg"):
        raise InputError(f"--task {args.task}: extrapolation needs topics, those of webnlg")
    args.task = args.task or ("webnlg" if args.study == "extrapolation" else "scitldr" if bart else "e2e")
    data = find_e2e(args.data) if args.task == "e2e" else args.data
    if data is None:
        raise InputError(f"a study needs the real data of {args.task}: give --data its folder")
    args.data = str(data)
    args.methods = [method for method in METHODS if not (bart and method == "embedding")]
    args.widths = {f"adapter {share}%": adapter_width(folder, share / 100) for share in (3, 0.1)}
    train = load_on_topics(args.task, "train", args.data, SEEN if args.study == "extrapolation" else None)
    args.tests = {}  # name of a test set -> how many texts are written for it
    for name, (split, topics) in test_sets(args).items():
        args.tests[name] = len(load_on_topics(args.task, split, args.data, topics)[: args.limit_test])
    settings = default_settings(args.model, args.kind, args.task)
    args.batch_size = settings["batch_size"]
    per_epoch = batches_per_epoch(range(sum(len(example.references) for example in train)), args.batch_size)
    args.steps = args.steps or STUDY_STEPS.get(args.model) or math.ceil(settings["epochs"] * per_epoch)
    args.seeds = list(dict.fromkeys(args.seeds or ([101] if args.study in ("low-data", "init") else [101, 102])))
    args.out = args.out or Path("runs", f"studies-{folder.resolve().name}")
    args.device = pick_device("auto")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    args.jobs = args.jobs or (cores if args.device == "cpu" else 1)
    args.threads = max(1, cores // args.jobs)  # runs of one thread each are faster than one with all threads


def adapter_width(folder: Path, share: float) -> int:
    """The width of adapters that come nearest to a share of the model's weights: shapes alone, nothing is loaded."""
    total = sum(p.numel() for p in empty_model(folder).parameters())
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in Adapters(empty_model(folder), width).parameters()) for width in (1, 2))
    return max(1, 1 + round((share * total - one) / (two - one)))


def main() -> None:
    args = parse_args()
    for script in ("train.py", "sample.py"):
        if not (SCRIPTS / script).is_file():
            raise InputError(f"{SCRIPTS / script} is missing: the studies run it, work in a clone of the repository")
    study, (data, methods) = STUDIES[args.study], TUNED[args.study]
    methods = [method for method in methods if method in (*args.methods, "prefix 10", "infix")]
    rates = f"learning-rates-{args.task}-{data}.json"
    tuned, own = resolve_model(args.model) / rates, args.out / rates  # beside the model; of earlier studies
    losses: Rates = read_json(tuned) if tuned.is_file() else {}
    untuned = [run for method in methods if method not in losses for run in tuning(args, data, method)]
    shared = args.out / f"tune-{data}"  # by several studies
    if args.dry_run:
        speed = measure(args)
        print_plan(untuned, shared, args, speed)
        done = read_rows(shared, untuned)
        add_losses(losses, [done[run.name] for run in untuned if run.name in done])
        unknown = {run.factors["method"] for run in untuned if run.name not in done}
        args.lr = {method: "TUNED" if method in unknown else best(losses[method]) for method in methods}
        print_plan(study(args), args.out / args.study, args, speed)
        times = ", ".join(f"{1000 * seconds:.1f} ms for a {what}" for what, seconds in speed.items())
        print(f"estimated from a measurement on {args.device}, {args.threads} thread(s): {times}")
        return
    with locked(shared, wait=f"waiting for another study that works in {shared}"):
        add_losses(losses, run_all(untuned, shared, args))
        losses = (read_json(own) if own.is_file() else {}) | losses
        with atomic_write(own) as file:  # put beside the model it spares other studies the tuning
            json.dump(losses, file, indent=2)
    args.lr = {method: best(losses[method]) for method in methods}
    runs, folder = study(args), args.out / args.study
    with locked(folder):
        reuse_runs(runs, args.out, folder)
        rows = run_all(runs, folder, args)
        text = table(rows, {method: losses[method] for method in methods}, args)
        with atomic_write(folder / "table.md") as file:
            file.write(text)
        print("\n" + text)
        draw(rows, folder / "figure.png")


def add_losses(losses: Rates, rows: list[Row]) -> None:
    """Add the dev losses of runs of `tuning`."""
    for row in rows:
        losses.setdefault(row["what"]["method"], {})[row["what"]["lr"]] = row["dev_loss"]


def best(losses: dict[str, float | None]) -> str:
    """The learning rate (a string) with the lowest dev loss; None stands for a run that diverged."""
    finite = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not finite:
        raise InputError(f"training diverged with each of the learning rates {', '.join(losses)}")
    return min(finite, key=lambda lr: finite[lr])


# ---- the plan and its time ----


def measure(args: Namespace) -> dict[str, float]:
    """Seconds here of a prefix's training on an example, and of a text, with as many threads as a run will have."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, args.device, pick_dtype("auto", args.device))
    tokenizer = load_tokenizer(resolve_model(args.model))
    examples, prefix = load_examples(args.task, "dev", args.data)[:64], Prefix(model, length=10)
    optimizer, graphs, seconds = make_optimizer(prefix, lr=0.0), training_graphs(model, prefix), []
    encoded = encode_pairs(examples, tokenizer, model, what=None)
    batches = list(islice(batch_stream(encoded, 16, 0, 0, model.encoder_decoder), 4))
    with packed_weights(model, training=True):
        for groups in [*batches, *batches]:
            started = time.perf_counter()
            batch = make_batch(groups, tokenizer, model, prefix.position_offset)
            training_step(model, prefix, [batch], optimizer, loss_scale(model, groups), graphs).item()
            seconds.append((time.perf_counter() - started) / pair_count(groups))
    seconds = seconds[len(batches) :]  # the first time includes compiling
    sources, started = [example.source for example in examples[:16]], time.perf_counter()
    generate(model, tokenizer, sources, prefix.fold(), what=None, **recipe(args.task))
    return {"training example": statistics.median(seconds), "text": (time.perf_counter() - started) / len(sources)}


def estimate(run: Run, args: Namespace, speed: dict[str, float]) -> float:
    """A run's seconds: fine-tuning takes about 1.5 times as long as training a prefix, a dev loss half as long."""
    trained = run.examples * (1.5 if "finetune" in run.train else 1) + run.dev_examples / 2
    texts = sum(args.tests.values()) if run.samples else 0
    return START + trained * speed["training example"] + texts * speed["text"]


def print_plan(runs: list[Run], folder: Path, args: Namespace, speed: dict[str, float]) -> None:
    """Print the runs that are not done yet, with their commands, and the time that they will take."""
    done = read_rows(folder, runs)
    left = [run for run in runs if run.name not in done]
    for run in left:
        print(f"\n{run.name}: {run.examples:,} training examples, {minutes(estimate(run, args, speed))}")
        for command in commands(run, folder):
            print("  " + shlex.join(["python", *command]))
    total = minutes(sum(estimate(run, args, speed) for run in left) / args.jobs)
    print(f"\n{folder}: {len(left)} of {len(runs)} runs to do, {args.jobs} at a time, {total}")


def minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


# ---- the runs ----


def commands(run: Run, folder: Path) -> Iterator[list[str]]:
    """A run's command lines, without Python's: train.py, then sample.py for each set of inputs."""
    out, train, sample = folder / run.name, *(os.path.relpath(SCRIPTS / name) for name in ("train.py", "sample.py"))
    yield [train, *run.train, "--resume", "--out", str(out)]
    for name, arguments in run.samples.items():
        yield [sample, "--prefix", str(out), *arguments, "--evaluate", "--output", str(out / f"{name}.txt")]


def reuse_runs(runs: list[Run], out: Path, folder: Path) -> None:
    """Copy those of a study's runs that were trained already, to tune a learning rate or for another study."""
    done = (path for path in out.glob(f"*/*/{TRAINED}") if path.parent.suffix != ".tmp")
    trained = {tuple(read_json(path)): path.parent for path in done}
    for run in runs:
        same, target = trained.get(tuple(run.train)), folder / run.name
        if same and not target.exists():
            part = target.with_name(target.name + ".tmp")  # it exists if an earlier copy was stopped
            ignored = shutil.ignore_patterns("*.tmp", "checkpoint.pt")  # they may vanish while its study goes on
            shutil.copytree(same, part, ignore=ignored, dirs_exist_ok=True)
            part.rename(target)


def is_trained(run: Run, out: Path) -> bool:
    """Whether train.py has finished this run with these arguments: only sample.py is left."""
    return (out / TRAINED).is_file() and read_json(out / TRAINED) == run.train


def run_all(runs: list[Run], folder: Path, args: Namespace) -> list[Row]:
    """Do the runs that have no row yet, args.jobs at a time -> the rows of all. InputError when one fails.

    However it ends, no process is left; a run that was stopped goes on from its checkpoint.
    """
    rows = read_rows(folder, runs)
    for run in runs:
        if run.name not in rows and not run.samples and is_trained(run, folder / run.name):
            rows[run.name] = make_row(run, folder / run.name, diverged=False)  # all that was missing
    waiting = [run for run in runs if run.name not in rows]
    running: dict[subprocess.Popen[bytes], tuple[Run, list[list[str]], float]] = {}  # run, commands left, start
    if not waiting:
        return [rows[run.name] for run in runs]
    for out in filter(Path.exists, (folder / run.name for run in waiting)):
        with locked(out):  # or it is at work still: a study that is killed cannot stop its runs
            pass
    speed = measure(args)
    total, done = sum(estimate(run, args, speed) for run in waiting), 0
    print(f"{folder}: {len(waiting)} of {len(runs)} runs to do, {args.jobs} at a time, {minutes(total / args.jobs)}")
    bar = tqdm(total=total, desc=f"{len(runs) - len(waiting)}/{len(runs)} runs", smoothing=0, mininterval=1,
               bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")  # fmt: skip
    try:
        while waiting or running:
            with signals.defer_signals():  # no process is started and then forgotten
                for process in [process for process in running if process.poll() is not None]:
                    run, left, began = running.pop(process)
                    out = folder / run.name
                    diverged = has_diverged(run, out, process.returncode)
                    if left and not diverged:
                        running[start(left.pop(0), out, args)] = run, left, began
                        continue
                    rows[run.name] = make_row(run, out, diverged)
                    write_jsonl(folder / "rows.jsonl", rows.values())
                    (out / "checkpoint.pt").unlink(missing_ok=True)  # fine-tuning's is four times as large as the model
                    done += estimate(run, args, speed)
                    bar.set_description_str(f"{sum(run.name in rows for run in runs)}/{len(runs)} runs")
                while waiting and len(running) < args.jobs:
                    run = waiting.pop(0)
                    left = list(commands(run, folder))
                    if is_trained(run, folder / run.name):
                        left.pop(0)
                    running[start(left.pop(0), folder / run.name, args)] = run, left, time.monotonic()
            spent = sum(min(time.monotonic() - began, estimate(run, args, speed)) for run, _, began in running.values())
            bar.update(done + spent - bar.n)
            time.sleep(0.1)
    finally:
        bar.close()
        for process in running:
            process.terminate()  # train.py saves its present step
        for process in running:
            process.wait()
    return [rows[run.name] for run in runs]


def start(command: list[str], out: Path, args: Namespace) -> subprocess.Popen[bytes]:
    """A command as a process that writes to OUT/output.txt."""
    out.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.device == "cpu" else {}
    with open(out / "output.txt", "ab") as log:
        return subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env={**os.environ, **threads})  # fmt: skip


def has_diverged(run: Run, out: Path, returncode: int) -> bool:
    """Whether training with a learning rate under trial diverged, now that a command of a run has ended.

    If the command succeeded, note that the run is trained. InputError if it failed for another reason.
    """
    if returncode == 0:
        if not is_trained(run, out):
            with atomic_write(out / TRAINED) as file:
                json.dump(run.train, file)
        return False
    output = (out / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
    last_line = (output.splitlines() or ["no output"])[-1].removeprefix("error: ")
    if run.samples or DIVERGED not in last_line:
        raise InputError(f"{run.name} failed: {last_line} (its output is in {out}/output.txt)")
    return True


def make_row(run: Run, out: Path, diverged: bool) -> Row:
    """The row of a run that is done; one that diverged has no dev loss."""
    row: Row = {"run": run.name, "what": run.factors, "train": run.train, "samples": run.samples, "dev_loss": None}
    if not diverged:
        result = read_json(out / "result.json")
        row |= {key: result[key] for key in ("dev_loss", "best_step", "share", "seconds")}
        row["scores"] = {name: read_json(out / f"{name}.json")["scores"] for name in run.samples}
    return row


def read_rows(folder: Path, runs: list[Run]) -> dict[str, Row]:
    """name -> row for all rows of FOLDER/rows.jsonl; InputError if one of these runs was done with other settings."""
    path = folder / "rows.jsonl"
    rows = {row["run"]: row for _, row in json_rows(path)} if path.is_file() else {}
    for run in runs:
        row = rows.get(run.name)
        if row and (row["train"], row["samples"]) != (run.train, run.samples):
            was, now = ([*map(str, x["train"]), *map(str, x["samples"].items())] for x in (row, vars(run)))
            old, new = next((a, b) for a, b in zip(was, now, strict=False) if a != b)
            raise InputError(f"{path} has {run.name} with {old}, not {new}: give the same settings, or another --out")
    return rows
