"""signals.py and what run_main makes of it."""

import os
import signal
import sys
import threading

import pytest

from minprefix import signals
from minprefix.files import run_main


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


def test_a_signal_that_is_ignored_stays_so():
    with signals.handled(signal.SIG_IGN, [signal.SIGINT]):
        run_main(lambda: send(signal.SIGINT))


def test_a_signal_is_put_off_to_the_end_of_the_block():
    done = []
    with signals.raised():
        with pytest.raises(signals.Stopped):
            with signals.put_off():
                send(signal.SIGTERM)
                send(signal.SIGTERM)
                with signals.put_off():  # within another: to the end of that
                    send(signal.SIGINT)
                done.append(True)
            done.append(False)
        with pytest.raises(signals.Stopped), signals.put_off():  # also if the block fails
            send(signal.SIGINT)
            raise ValueError
        with pytest.raises(signals.Stopped):  # and then no longer
            send(signal.SIGTERM)
    assert done == [True]


def test_what_a_thread_does_is_left_alone():
    def work():
        with signals.put_off():
            done.append(True)

    done = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
