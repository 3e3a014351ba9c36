"""The rooms of the package: which may import which; and the commands of the README, which .ci/run runs."""

import ast
import re
import sys
from pathlib import Path

import pytest

import minprefix
from minprefix.core.prefix import save_prefix
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


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
KNOWN_VIOLATIONS = {
    ("minprefix/core/bart.py", "minprefix.formats.config"),
    ("minprefix/core/bart.py", "minprefix.formats.safetensors"),
    ("minprefix/core/batches.py", "minprefix.data.examples"),
    ("minprefix/core/batches.py", "minprefix.data.tasks"),
    ("minprefix/core/batches.py", "minprefix.formats.load"),
    ("minprefix/core/batches.py", "minprefix.formats.tokenizer"),
    ("minprefix/core/generate.py", "minprefix.cli.options"),
    ("minprefix/core/generate.py", "minprefix.data.tasks"),
    ("minprefix/core/generate.py", "minprefix.formats.load"),
    ("minprefix/core/generate.py", "minprefix.formats.tokenizer"),
    ("minprefix/core/gpt2.py", "minprefix.formats.config"),
    ("minprefix/core/gpt2.py", "minprefix.formats.safetensors"),
    ("minprefix/core/loss.py", "minprefix.formats.load"),
    ("minprefix/core/prefix.py", "minprefix.formats.hub"),
    ("minprefix/core/prefix.py", "minprefix.formats.load"),
    ("minprefix/core/prefix.py", "minprefix.formats.peft"),
    ("minprefix/core/prefix.py", "minprefix.formats.safetensors"),
    ("minprefix/core/prefix.py", "minprefix.formats.tokenizer"),
    ("minprefix/core/training.py", "minprefix.formats.load"),
    ("minprefix/core/training.py", "minprefix.formats.tokenizer"),
    ("minprefix/core/training.py", "minprefix.methods.baselines"),
}


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


def test_what_the_readme_imports_from_the_package_is_listed():
    names = {name for line in re.findall(r"^from minprefix import (.*)", README, re.M) for name in line.split(", ")}
    assert "metrics" in names and names <= set(minprefix.__all__) and all(hasattr(minprefix, name) for name in names)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """All of its blocks, one after the other, in a folder with the prefixes that they name."""
    monkeypatch.chdir(tmp_path)
    model = minprefix.load_model("gpt2-mini")
    for path in ("runs/mine/prefix.safetensors", "a.safetensors", "b.safetensors"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_prefix(path, minprefix.Prefix(model, 5, 0).fold(), model, {"base_model": "gpt2-mini"})
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4 and len(names["texts"]) == 3
    assert names["logits"].shape == (1, 2 + len(names["tokenizer"].encode("A short one")), 4100)


def test_no_figure_needs_pyplot():
    """It keeps every figure until it is closed, and may choose a backend that opens windows."""
    for path, source in sources().items():
        assert "pyplot" not in source, path


def test_ci_runs_the_readmes_test_command():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for words in ('pip install -q -e ".[test]"', "python -m pytest"):
        assert words in README and words in ci


def test_the_commands_in_the_readmes_exist():
    weights = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"--model (\w+-mini)\s", README) + re.findall(r"weights/([\w.-]*\w)", README + weights):
        assert (ROOT / "weights" / name).exists(), name
    pretrain = (ROOT / "weights" / "pretrain.py").read_text(encoding="utf-8")
    for what in re.findall(r"weights/pretrain.py (\w+)", README + weights + pretrain):
        assert f'"{what}"' in pretrain[pretrain.index("choices=") :].splitlines()[0], what
    for script in ("train", "sample"):
        known = set(re.findall(r'"(--[\w-]+)"', (ROOT / f"{script}.py").read_text(encoding="utf-8")))
        for line in re.findall(rf"python {script}\.py (.*)", README):
            assert set(re.findall(r"--[\w-]+", line.split(" #")[0])) <= known, line
