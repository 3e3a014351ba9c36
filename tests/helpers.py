"""What tests of commands and of loaders share: a script called as from the shell, and its complaints."""

import sys

import pytest

from minprefix.system.errors import InputError, run_main

ROWS = [{"source": f"item {i} of the list", "target": f"This is item number {i}."} for i in range(40)]
MR = "name[The Golden Lantern], eatType[pub], food[Thai]"


def call(script, capsys, *args):
    """Run a script's main with arguments -> (exit code, stdout, stderr)."""
    sys.argv = [script.__name__ + ".py", *map(str, args)]
    code = 0
    try:
        run_main(script.main)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_clear_line(script, arguments, message, capsys, world):
    """One line that holds the message, but for those on sources that were cut; exit code 2; nothing half-written."""
    code, out, err = call(script, capsys, *(arguments.split() if isinstance(arguments, str) else arguments))
    lines = [line for line in err.splitlines() if not line.startswith("cut ")]
    assert code == 2, (out, err)
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert not list(world.rglob("*.tmp"))


def complaint(function, *arguments):
    """The message of the InputError that a call raises: one line, not too long."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)
