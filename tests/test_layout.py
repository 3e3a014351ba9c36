"""The README's reading order is the order of the imports, and its commands are those that .ci/run runs."""

import re
import sys
from pathlib import Path

import minprefix
from minprefix.core.prefix import save_prefix
from tests.tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_file_imports_only_files_above_it():
    table = README[README.index("## How it works") :]
    order = [name for name in re.findall(r"`minprefix/(\w+)\.py`", table)]
    assert sorted(order) == sorted(p.stem for p in (ROOT / "minprefix").glob("*.py") if p.stem != "__init__")
    for place, name in enumerate(order):
        source = (ROOT / "minprefix" / f"{name}.py").read_text(encoding="utf-8")
        if name == "prefix":  # the one exception: `python -m minprefix` is prefix_tool.py
            source = source[: source.index("if __name__")]
        found = re.findall(r"^\s*from minprefix(?:\.(\w+))? import (.+)", source, re.M)
        imported = {part for module, parts in found for part in ([module] if module else parts.split(", "))}
        assert imported <= set(order[:place]), name


def test_the_core_has_as_many_lines_as_the_readme_says():
    core = "attention gpt2 bart prefix batches loss muon training generate".split()
    lines = sum(len((ROOT / "minprefix" / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in core)
    assert "about 2,000 lines" in README and abs(lines - 2000) < 100, lines


def test_the_core_needs_four_packages():
    for path in [*(ROOT / "minprefix").glob("*.py"), ROOT / "train.py", ROOT / "sample.py"]:
        imported = set(re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M))
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
    for path in (ROOT / "minprefix").glob("*.py"):
        assert "pyplot" not in path.read_text(encoding="utf-8"), path


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
