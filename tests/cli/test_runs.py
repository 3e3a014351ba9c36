"""A run's folder, and the command that train.py prints last: one that sample.py takes."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from minprefix.cli import sample_args
from minprefix.cli.runs import disk_size, remove_half_written, run_folder, sample_command, texts_file
from minprefix.core.encode import Example
from minprefix.system.errors import InputError
from minprefix.system.files import locked
from tests.tiny import ROOT

SHORT = [Example("item 3", ["It is three."])]


@pytest.mark.parametrize(
    "task, data, test, expected",
    [
        ("e2e", None, SHORT, "--input 'name[The Golden Lantern]"),
        ("my own.jsonl", "here", SHORT, "--task 'my own.jsonl' --split test --data here --limit 10"),
        ("scitldr", "sci tldr", SHORT, "--task scitldr --split test --data 'sci tldr' --limit 10"),
        ("webnlg", "webnlg", [], "--task webnlg --split dev --data webnlg --limit 10"),
    ],
)
def test_what_to_try_first(task, data, test, expected, monkeypatch):
    command = sample_command(Path("runs/a b/prefix.safetensors"), task, data, test)
    assert command.startswith(f"python sample.py --prefix 'runs/a b/prefix.safetensors' {expected}")
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    monkeypatch.setattr(sample_args, "check_task_files", lambda task, data: None)  # the data are not there
    args = sample.parse_args()
    assert (args.task or args.input) and args.data == (data if args.task else None)


def test_a_folder_is_a_model(tmp_path):
    assert sample_command(tmp_path, "e2e", None, []).startswith(f"python sample.py --model {tmp_path} --input")


def test_scored_texts_lie_in_the_run(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    for name in ("log.jsonl", "prefix.safetensors", "model/config.json"):
        (tmp_path / "run" / name).write_text("four")
    for trained in ("run", "run/prefix.safetensors", "run/model"):
        assert texts_file(tmp_path / trained, None, "inputs", []) == tmp_path / "run" / "texts-inputs.txt"
    elsewhere = texts_file(tmp_path / "elsewhere.safetensors", "e2e", "test", ["a/b"])
    assert elsewhere == Path("texts-elsewhere-e2e-test-a_b.txt")
    assert disk_size(tmp_path / "run" / "prefix.safetensors") == disk_size(tmp_path / "run" / "model") == 4


def enter(out, resume):
    with run_folder(out, resume, "e2e", Path("m")) as folder:
        return folder


def test_a_run_is_not_overwritten_when_its_checkpoint_is_gone(tmp_path):
    """Studies delete it; a run that is killed at once has none yet."""
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="holds a run already: add --resume"):
        enter(tmp_path, False)
    enter(tmp_path, True)
    (tmp_path / "result.json").write_text("{}")
    for resume in (False, True):
        with pytest.raises(InputError, match="holds a finished run whose checkpoint is gone: choose another --out"):
            enter(tmp_path, resume)
    (tmp_path / "checkpoint.pt").write_text("")
    enter(tmp_path, True)


def test_runs_that_are_started_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run_folder(None, False, "e2e", Path("m")) as one, run_folder(None, False, "e2e", Path("m")) as two:
        assert (one, two) == (Path("runs/e2e-m"), Path("runs/e2e-m-2"))
        for resume in (False, True):
            with pytest.raises(InputError, match="another process is working in runs/e2e-m-2: wait until it has"):
                enter(two, resume)
        with pytest.raises(InputError, match="working in runs/e2e-m:"):  # neither was begun
            enter(None, True)
        (one / "log.jsonl").write_text("")
    assert list(Path().rglob("*")) == [Path("runs"), one, one / "log.jsonl"]  # an empty folder is taken away again
    assert enter(None, True) == one and enter(None, False) == two


def test_what_is_resumed_is_the_last_run_that_was_begun(tmp_path, monkeypatch):
    """A run that is killed while it loads its model leaves an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("e2e-m", "e2e-m-2", "e2e-m-3"):
        Path("runs", name).mkdir(parents=True)
    for name in ("e2e-m", "e2e-m-2"):
        Path("runs", name, "log.jsonl").write_text("")
    assert enter(None, True) == Path("runs/e2e-m-2") and enter(None, False) == Path("runs/e2e-m-4")


def test_a_link_whose_target_is_not_there_leads_to_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("elsewhere/runs")
    with run_folder(None, False, "e2e", Path("m")) as folder:
        assert folder == Path("runs/e2e-m") and Path("elsewhere/runs/e2e-m").is_dir()
    Path("file").write_text("")
    Path("runs").unlink()
    Path("runs").symlink_to("file/runs")
    with pytest.raises(InputError, match="cannot write runs/e2e-m: Not a directory"):
        enter(None, False)


def test_without_locks_a_new_run_has_a_folder_of_its_own_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    with run_folder(None, False, "e2e", Path("m")) as one, run_folder(None, False, "e2e", Path("m")) as two:
        assert one != two and enter(two, True) == two


@pytest.mark.slow
def test_a_lock_ends_with_its_process(tmp_path):
    program = ("import sys, time; from pathlib import Path; from minprefix.system.files import locked\n"
               "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(InputError, match="another process is working in"), locked(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path / "run"):
        assert not list((tmp_path / "run").iterdir())


def test_half_written_files_are_removed_and_no_others(tmp_path):
    (tmp_path / "model").mkdir()
    kept = ["checkpoint.pt", "result.json", "model/config.json", "notes.tmp", "my.txt.1.tmp"]
    ours = ["checkpoint.pt", "log.jsonl", "result.json", "loss.png", "adapter.safetensors", "model/model.safetensors"]
    for name in [*kept, *(f"{name}.k1ll_3d.tmp" for name in ours)]:
        (tmp_path / name).write_text("half")
    remove_half_written(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
    remove_half_written(tmp_path / "nowhere")
