"""The folder of a run of train.py, and the commands that go on from it."""

import contextlib
import itertools
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from minprefix.core.encode import Example
from minprefix.formats.hub import model_name
from minprefix.formats.safetensors import read_object
from minprefix.methods.baselines import METHODS
from minprefix.system import distributed, signals
from minprefix.system.errors import InputError, OutOfMemory, WriteError, one_line_errors
from minprefix.system.files import locked

EXAMPLE = "name[The Golden Lantern], eatType[pub], food[Thai], area[riverside], near[The Mill]"


def is_run(folder: Path) -> bool:
    """Whether a run was started there: the log is written first and stays; the checkpoint may be deleted later."""
    return (folder / "log.jsonl").exists()


def has_checkpoint(folder: Path) -> bool:
    """Whether the run in a folder can be resumed."""
    return (folder / "checkpoint.pt").exists()


@contextlib.contextmanager
def run_folder(out: Path | None, resume: bool, task: str, model: Path) -> Iterator[Path]:
    """The run's folder, --out or by default runs/TASK-MODEL, locked against other processes while the block runs."""
    check_out(out)
    name = Path(model_name(model) or model.resolve()).name
    with contextlib.ExitStack() as locks:
        yield distributed.broadcast_from_rank0(lambda: take_folder(out, resume, f"{Path(task).stem}-{name}", locks))


def check_out(out: Path | None) -> None:
    """InputError if --out is given, and is a file."""
    if out and out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")


def take_folder(out: Path | None, resume: bool, name: str, locks: contextlib.ExitStack) -> Path:
    """--out or runs/NAME, locked. Where runs/NAME exists a new run takes runs/NAME-2, and so on."""
    names = (Path("runs", name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    if out is None and not resume:
        for folder in names:
            with contextlib.suppress(FileExistsError):
                locks.enter_context(locked(folder, new=True))
                return folder
    existing = list(itertools.takewhile(Path.exists, names))
    folder = out or next(filter(is_run, reversed(existing)), Path("runs", name))  # the last run that was started
    locks.enter_context(locked(folder))
    check_free(folder, resume)
    remove_half_written(folder)
    return folder


def check_free(folder: Path, resume: bool) -> None:
    """InputError where a run would overwrite another that is in its folder."""
    if is_run(folder) and (folder / "result.json").exists() and not has_checkpoint(folder):
        raise InputError(f"{folder} holds a finished run whose checkpoint is gone: choose another --out")
    if is_run(folder) and not resume:
        raise InputError(f"{folder} holds a run already: add --resume to go on with it, or choose another --out")


def remove_half_written(out: Path) -> None:
    """Remove the temporary files NAME.*.tmp of `atomic_write` that a killed run left in its folder."""
    for name in ("checkpoint.pt", "log.jsonl", "*.safetensors", "model/*", "loss.png", "result.json"):
        for path in out.glob(f"{name}.*.tmp"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Add the command that resumes the run to an error that stops the block from outside, if there is a checkpoint."""
    try:
        with one_line_errors():
            yield
    except (KeyboardInterrupt, WriteError, OutOfMemory, distributed.RankLost) as error:
        signals.ignore()  # torchrun sends one when a process has ended: it would take this error's place
        if error.args and has_checkpoint(out):
            error.args = (f"{error.args[0]}; go on with: {resume_command(out)}", *error.args[1:])
        raise


def resume_command(out: Path) -> str:
    """The shell command that resumes the present run."""
    command = [sys.orig_argv[0], *sys.argv]
    if distributed.world_size() > 1:
        command = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *sys.argv]
    command = [word for word in command if word != "--resume"]
    folder = [] if any(word.startswith("--out") for word in command) else ["--out", str(out)]
    return shlex.join([*command, *folder, "--resume"])


def sample_command(path: Path, task: str, data: str | None, test: list[Example]) -> str:
    """What to try first with what was trained: an E2E input, or ten inputs of another task."""
    command = f"python sample.py --{'model' if path.is_dir() else 'prefix'} {shlex.quote(str(path))}"
    if task == "e2e":
        return f"{command} --input {shlex.quote(EXAMPLE)}"
    folder = f" --data {shlex.quote(data)}" if data else ""
    return f"{command} --task {shlex.quote(task)} --split {'test' if test else 'dev'}{folder} --limit 10"


def texts_file(trained: Path, task: str | None, inputs: str, topics: list[str]) -> Path:
    """The default file of texts that are scored: texts-SPLIT.txt in the run's folder, or in the current one.

    trained: a prefix or a model, whose name is in the file's if it is in no run's folder. task: that of the inputs, in
    the name if the run was not trained on it. inputs: their split, or their file's name.
    """
    run = next((folder for folder in (trained, trained.parent) if is_run(folder)), None)
    words = ["texts"]
    if not run:
        path = trained.resolve()  # METHOD.safetensors is what any run calls it
        path = path.parent if path.name in {f"{method}.safetensors" for method in METHODS} else path
        words.append(path.name.removesuffix(".safetensors"))
    if task and not (run and is_trained_on(run, task)):
        words.append(Path(task).stem)
    words += [inputs, *(topic.replace("/", "_") for topic in topics)]
    return (run or Path()) / f"{'-'.join(words)}.txt"


def is_trained_on(run: Path, task: str) -> bool:
    """Whether a run's result.json says that it was trained on a task."""
    result = read_object(run / "result.json") if (run / "result.json").is_file() else {}
    settings = result.get("settings")
    own = settings.get("task") if isinstance(settings, dict) else None
    return isinstance(own, str) and os.path.abspath(own) == os.path.abspath(task)  # FILE.jsonl by whichever path


def disk_size(path: Path) -> int:
    """The bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
