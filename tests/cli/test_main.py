"""python -m minprefix: one entry for the tools, which imports no more than the one that is asked for."""

import subprocess
import sys

import pytest

from minprefix import __main__ as entry
from tests.helpers import call
from tests.tiny import ROOT


@pytest.mark.parametrize("arguments, said", [((), "usage: "), (("shw", "x"), "no tool 'shw'"), (("",), "usage: ")])
def test_no_tool_or_an_unknown_one_is_one_line_with_the_usage(arguments, said, capsys):
    code, out, err = call(entry, capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and said in err and len(err.splitlines()) == 1
    assert "python -m minprefix show|export|import|bench|study" in err


def test_the_help_names_every_tool(capsys):
    code, out, _ = call(entry, capsys, "--help")
    assert code == 0 and all(f"python -m minprefix {tool} " in out for tool in entry.TOOLS)


@pytest.mark.parametrize("tool", entry.TOOLS)
def test_each_tool_has_a_help_of_its_own(tool, capsys):
    with pytest.raises(SystemExit) as end:
        sys.argv = ["minprefix", tool, "--help"]
        entry.main()
    assert end.value.code == 0 and f"usage: python -m minprefix {tool}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tool_that_is_not_asked_for_is_not_imported():
    program = ("import sys\nfrom minprefix import __main__ as entry\nsys.argv = ['minprefix', 'show', '--help']\n"
               "try:\n    entry.main()\nexcept SystemExit:\n    pass\n"
               "print([name for name in sys.modules if name.startswith('minprefix.studies')])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr
