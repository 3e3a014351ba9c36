"""signals.py and what run_main makes of it."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from minprefix.system import signals
from minprefix.system.errors import InputError, WriteError, run_main
from minprefix.system.files import atomic_write, read_text
from tests.tiny import ROOT

needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_script_with_one_line(number, code, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: send(number))
    assert stop.value.code == code and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("lines", [1, 10_000])  # fewer and more than a buffer holds
def test_a_closed_pipe_ends_a_script_without_a_word(lines, capsys, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: print("a text\n" * lines))
    assert stop.value.code == 141 and capsys.readouterr().err == ""


def raise_error(error):
    raise error


OUT_OF_MEMORY = {
    "Python": lambda: bytearray(10**14),
    "torch on the CPU": lambda: torch.empty(10**14),
    "torch on a GPU": lambda: raise_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "cuBLAS": lambda: raise_error(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
    "the system": lambda: raise_error(OSError(12, "Cannot allocate memory")),
}


@pytest.mark.parametrize("who", OUT_OF_MEMORY)
def test_too_little_memory_is_one_line_with_a_remedy(who, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(OUT_OF_MEMORY[who])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: out of memory"), err
    assert "lower --batch-size" in err and (who != "torch on a GPU" or "(2.00 GiB more needed)" in err)


def test_a_mistake_of_ours_keeps_its_traceback():
    for error in (RuntimeError("shapes do not fit"), OSError("no such thing")):
        with pytest.raises(type(error)):
            run_main(lambda error=error: raise_error(error))


@needs_dev_full
def test_a_full_disk_below_stdout_is_one_line(capsys, monkeypatch):
    for lines in (1, 10_000):  # fewer and more than a buffer holds
        with open("/dev/full", "w") as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            with pytest.raises(SystemExit) as stop:
                run_main(lambda lines=lines: print("a text\n" * lines))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, err
        assert err.startswith("error: cannot write the output: No space left on device; make room"), err


@needs_dev_full
def test_a_device_without_room_is_named():
    with pytest.raises(WriteError, match="cannot write /dev/full: No space left on device"):
        with atomic_write("/dev/full") as file:
            file.write("text")


@pytest.mark.slow
@needs_dev_full
@pytest.mark.parametrize("streams, said", [(">/dev/full", True), ("2>/dev/full", False), (">&- 2>&-", False)])
def test_a_process_whose_output_cannot_be_written_ends_with_its_code(streams, said):
    """To the very end of Python, which flushes what is left."""
    code = "from minprefix.system.errors import run_main; from minprefix.system.files import read_text; "
    code += "from tqdm import tqdm; run_main(lambda: ([*tqdm([1])], print('text'), read_text('/nowhere')))"
    done = subprocess.run(["bash", "-c", f"exec {sys.executable} -c \"{code}\" {streams}"], capture_output=True,
                          text=True, cwd=ROOT)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert ("error: " in done.stderr) == said


def test_without_stdin_stdout_and_stderr_a_script_still_ends_as_it_should(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    run_main(lambda: read_text("-"))
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: raise_error(InputError("no one reads this")))
    assert stop.value.code == 2


def test_a_signal_that_is_ignored_stays_so():
    with signals.handled(signal.SIG_IGN, [signal.SIGINT]):
        run_main(lambda: send(signal.SIGINT))


def test_a_signal_is_put_off_to_the_end_of_the_block():
    done = []
    with signals.signals_as_exceptions():
        with pytest.raises(signals.Stopped):
            with signals.defer_signals():
                send(signal.SIGTERM)
                send(signal.SIGTERM)
                with signals.defer_signals():  # within another: to the end of that
                    send(signal.SIGINT)
                done.append(True)
            done.append(False)
        with pytest.raises(signals.Stopped), signals.defer_signals():  # also if the block fails
            send(signal.SIGINT)
            raise ValueError
        with pytest.raises(signals.Stopped):  # and then no longer
            send(signal.SIGTERM)
    assert done == [True]


def test_what_a_thread_does_is_left_alone():
    def work():
        with signals.defer_signals():
            done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
