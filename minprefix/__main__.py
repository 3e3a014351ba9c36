"""The package's tools, each with a --help of its own; train.py and sample.py are beside the package.

python -m minprefix show RUN            what a prefix is, and how much attention it gets
python -m minprefix export ...          a prefix as a PEFT adapter
python -m minprefix import ...          a PEFT adapter as a prefix file
python -m minprefix bench train ...     speed and memory of training, or of generate; or a report of both
python -m minprefix study NAME ...      a study of the paper: its runs, a table, a figure
"""

import sys

from minprefix.system.errors import InputError, run_main

TOOLS = ("show", "export", "import", "bench", "study")


def main() -> None:
    tool = sys.argv[1] if len(sys.argv) > 1 else ""
    # Each module is imported when it is needed: the bench and the studies need much that the others do not.
    if tool in ("show", "export", "import"):
        from minprefix.cli.prefix_tool import main as run
    elif tool == "bench" and sys.argv[2:3] == ["report"]:
        from minprefix.studies.bench_report import main as run
    elif tool == "bench":
        from minprefix.studies.bench import main as run
    elif tool == "study":
        from minprefix.studies.experiments import main as run
    elif tool in ("-h", "--help"):
        print(__doc__)
        return
    else:
        unknown = f"there is no tool {tool!r}; " if tool else ""
        raise InputError(f"{unknown}usage: python -m minprefix {'|'.join(TOOLS)} ...; --help tells what they are")
    if tool in ("bench", "study"):  # prefix_tool.py reads its command itself
        del sys.argv[1]
    run()


if __name__ == "__main__":
    run_main(main)
