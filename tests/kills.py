"""A run killed with SIGKILL again and again, and resumed each time, ends with the same prefix, bit for bit.

    python tests/kills.py --kills 20 --seed 0          one line a kill, then whether all is the same

Half of the kills come at any moment of the run, from Python's start to the last file; half of them when a file is just
being written. A run that ends before its next kill is compared with one that was never interrupted, then begun anew.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minprefix.data.sample_e2e import sample_rows
from tests.tiny import ROOT

TIMES = ("seconds", "examples_per_s")  # what no two runs share
STEPS, EVERY = 60, 10  # 7 dev losses, after each a checkpoint and a log are written


def command(task, out):
    """train.py on the bundled GPT-2, one thread: the kernels, and so the last bits, are the same each time."""
    options = f"--task {task} --steps {STEPS} --eval-every {EVERY} --limit 200 --eval-inputs 0 --device cpu --resume"
    return [sys.executable, str(ROOT / "train.py"), "--model", "gpt2-mini", *options.split(), "--out", str(out)]


def start(task, out):
    out.mkdir(exist_ok=True)
    with open(out / "output.txt", "ab") as log:
        return subprocess.Popen(command(task, out), stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process, out):
    if process.wait():
        sys.exit(f"train.py failed: {(out / 'output.txt').read_text()}")


def end_by_kill(process, out, seconds, writes):
    """Kill a process after so many seconds, or while it writes its file number `writes`: whether it was still there."""
    began, seen = time.monotonic(), {path.name for path in out.glob("*.tmp")}  # those are of earlier kills
    left = len(seen)
    while process.poll() is None:
        seen |= {name for name in os.listdir(out) if name.endswith(".tmp")}
        if time.monotonic() - began > seconds or len(seen) - left == writes:
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.0003)
    return False


def step_of(out):
    """Where a killed run goes on."""
    path = out / "checkpoint.pt"
    return f"step {torch.load(path, weights_only=True)['step']}" if path.exists() else "the start"


def results(out):
    """All that a run leaves, but for times and its own name."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    keys = [sorted(part) for part in (result, *rows)]
    result["settings"].pop("out")
    values = [{key: value for key, value in part.items() if key not in TIMES} for part in (result, *rows)]
    left = [path.name for path in out.glob("*.tmp")]
    return {"prefix": (out / "prefix.safetensors").read_bytes(), "keys": keys, "values": values, "leftovers": left}


def compare(found, whole):
    return "the same" if found == whole else "other " + " and ".join(key for key in whole if found[key] != whole[key])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args()
    rng, differing, runs = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        rows = [{"source": source, "target": target} for source, target in sample_rows("train")[:400]]
        task = scratch / "rows.jsonl"
        task.write_text("".join(json.dumps(row) + "\n" for row in rows))
        finish(start(task, scratch / "whole"), scratch / "whole")  # torch.compile fills its cache
        began = time.monotonic()
        finish(start(task, scratch / "again"), scratch / "again")
        length, whole = time.monotonic() - began, results(scratch / "whole")
        print(f"uninterrupted: {length:.1f} s; a second time {compare(results(scratch / 'again'), whole)}", flush=True)
        done, out = 0, scratch / "killed 0"
        while True:
            process = start(task, out)
            at_write = rng.random() < 0.5
            seconds, writes = (3600, rng.randint(1, 6)) if at_write else (rng.uniform(0, length), -1)
            if done < args.kills and end_by_kill(process, out, seconds, writes):
                done += 1
                moment = f"at write {writes}" if at_write else f"after {seconds:.1f} s"
                left = ", ".join(sorted(path.name for path in out.glob("*.tmp"))) or "none"
                print(f"kill {done} {moment}: goes on from {step_of(out)}; half-written files: {left}", flush=True)
                continue
            finish(process, out)
            runs, verdict = runs + 1, compare(results(out), whole)
            differing += verdict != "the same"
            print(f"run {runs} is done: {verdict}", flush=True)
            if done == args.kills:
                break
            out = scratch / f"killed {runs}"
    print(f"{done} kills in {runs} runs, {differing} of them differ from the uninterrupted one")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
