"""Which folder of the package may import which; the Python, the commands and the links of the READMEs."""

import argparse
import ast
import re
import shlex
import sys

import pytest

import minprefix.__main__
import sample
import train
from minprefix.cli.options import Parser
from tests.tiny import ROOT

sys.path.insert(0, str(ROOT / "weights"))
import new_names  # noqa: E402
import pretrain  # noqa: E402

READMES = {  # path in the repository -> text
    path: (ROOT / path).read_text(encoding="utf-8")
    for path in ("README.md", "minprefix/README.md", "tests/README.md", "weights/README.md", "weights/RESULTS.md")
}
PROGRAMS = {"-m minprefix": minprefix.__main__, "train.py": train, "sample.py": sample,
            "weights/pretrain.py": pretrain, "weights/new_names.py": new_names}  # fmt: skip
COMMANDS = [  # a README's path, a program, its arguments
    (path, program, arguments)
    for path, text in READMES.items()
    for block in re.findall(r"```\n(.*?)```", text, re.S)
    for program, arguments in re.findall(
        rf"^(?:python|torchrun \S+) ({'|'.join(PROGRAMS)}) (.*)", block.replace("\\\n", " "), re.M
    )
]
assert len(COMMANDS) > 30, "the READMEs' commands are not where this test looks"


# A room may import those above it, and itself; data, metrics and methods do not import one another.
ALLOWED = {
    "system": set(),
    "core": {"system"},
    "formats": {"system", "core"},
    "data": {"system", "core", "formats"},
    "metrics": {"system", "core", "formats"},
    "methods": {"system", "core", "formats"},
    "cli": {"system", "core", "formats", "data", "metrics", "methods"},
    "studies": {"system", "core", "formats", "data", "metrics", "methods", "cli"},
}
# Imports that still go against this: the set may only shrink.
KNOWN_VIOLATIONS: set[tuple[str, str]] = set()


def sources():
    """Path in the repository -> text, of each file of the package, in whatever folder."""
    files = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "minprefix").rglob("*.py"))}
    assert len(files) > 40, "the package is not where this test looks"
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def module_name(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(file, source, modules):
    """The package's modules that a file imports, anywhere in it, relatively or not.

    modules: the names of all; `from minprefix.core import bart` is of minprefix.core.bart, a module.
    """
    package = module_name(file).split(".")
    if not file.endswith("/__init__.py"):
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{parent}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else parent for name in names}
    return {name for name in found if name.split(".")[0] == "minprefix"}


def violations(files):
    """(file, module) of each import that ALLOWED does not allow."""
    modules, found = {module_name(file) for file in files}, set()
    for file, source in files.items():
        place = file.split("/")[1:-1]
        if not place:  # __init__.py and __main__.py stand on top
            continue
        for module in imports(file, source, modules):
            room = module.split(".")[1] if "." in module else ""
            if room != place[0] and room not in ALLOWED[place[0]]:
                found.add((file, module))
    return found


def test_imports_point_one_way():
    files = sources()
    folders = {path.parent.name for path in (ROOT / "minprefix").glob("*/*.py")}
    assert folders == set(ALLOWED), "a room that ALLOWED does not name, or one that is gone"
    at_top = {file for file in files if file.count("/") == 1}
    assert at_top == {"minprefix/__init__.py", "minprefix/__main__.py"}, "each other file lies in a room"
    found = violations(files)
    assert found - KNOWN_VIOLATIONS == set(), "imports against the direction"
    assert KNOWN_VIOLATIONS - found == set(), "no longer violations: take them out of the set"


@pytest.mark.parametrize(
    "line, module",
    [
        ("import minprefix.cli.options", "minprefix.cli.options"),
        ("from minprefix.cli.options import flag", "minprefix.cli.options"),
        ("from minprefix.cli import options as o", "minprefix.cli.options"),
        ("from minprefix import cli", "minprefix.cli"),
        ("from minprefix import load_model", "minprefix"),
        ("from ..cli.options import flag", "minprefix.cli.options"),
        ("from ..cli import options", "minprefix.cli.options"),
        ("from .. import cli", "minprefix.cli"),
        ("def f():\n    if 1:\n        from minprefix.cli.options import flag", "minprefix.cli.options"),
        ("from minprefix.system.errors import InputError\nfrom . import bart\nimport torch", None),
    ],
)
def test_an_import_against_the_direction_is_found(line, module):
    files = {**sources(), "minprefix/core/new.py": line}
    new = {to for file, to in violations(files) if file == "minprefix/core/new.py"}
    assert new == ({module} if module else set())


def test_the_core_needs_four_packages():
    scripts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("train.py", "sample.py")}
    for path, source in {**sources(), **scripts}.items():
        imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M))
        assert imported <= {"torch", "numpy", "tiktoken", "tqdm", "minprefix", *sys.stdlib_module_names}, path


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, text in READMES.items() if "```python" in text])
def test_the_python_of_a_readme_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # it names a bundled prefix
    names = {}
    for block in re.findall(r"```python\n(.*?)```", READMES[path], re.S):
        exec(block, names)
    assert set(minprefix.__all__) & names.keys() and names["logits"].isfinite().all()


class Parsed(Exception):
    """A program has read its command line."""


@pytest.mark.parametrize("path, program, arguments", COMMANDS)
def test_the_commands_of_a_readme_are_understood(path, program, arguments, monkeypatch):
    """The program parses them, then it is stopped; what they name in weights/ is there."""

    def parse_args(parser):
        argparse.ArgumentParser.parse_args(parser)
        raise Parsed

    words = shlex.split(arguments, comments=True)
    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(Parsed):
        PROGRAMS[program].main()
    assert [word for word in words if word.startswith("weights/") and not (ROOT / word).exists()] == []


@pytest.mark.parametrize("path", READMES)
def test_the_links_of_a_readme_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", READMES[path]):
        assert (ROOT / path).parent.joinpath(link).exists(), link


def test_no_figure_needs_pyplot():
    """It keeps every figure until it is closed, and may choose a backend that opens windows."""
    for path, source in sources().items():
        assert "pyplot" not in source, path


def test_ci_runs_the_test_command_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for words in ('pip install -q -e ".[test]"', "python -m pytest"):
        assert words in READMES["README.md"] and words in ci
