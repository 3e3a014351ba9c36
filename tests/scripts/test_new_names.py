"""weights/new_names.py: the inputs that it makes, and that it runs."""

import sys

import pytest

from minprefix.core.encode import Example
from minprefix.system.errors import run_main
from tests.tiny import ROOT, write_tiny_model

sys.path.insert(0, str(ROOT / "weights"))
import new_names  # noqa: E402

pytestmark = pytest.mark.slow


def test_only_the_names_are_replaced():
    source = "name : Blue Spice | Type : pub | food : name : x | area : riverside | near : Café Sicilia"
    references = ["Blue Spice is near Café Sicilia.", "A pub by the river."]
    assert new_names.renamed(Example(source, references), 1) == Example(
        "name : Green Dragon | Type : pub | food : name : x | area : riverside | near : Station Road",
        ["Green Dragon is near Station Road.", "A pub by the river."],
    )
    example = Example("name : Blue Spice", ["Blue Spice."])
    assert new_names.renamed(example, 30) == Example("name : The Golden Lantern", ["The Golden Lantern."])


def test_it_prints_a_line_for_each_prefix(capsys, monkeypatch, tmp_path):
    (tmp_path / "devset.csv").write_text('mr,ref\n"name[Blue Spice], near[Burger King]",x\n')
    file = ROOT / "weights" / "prefixes" / "gpt2-mini-e2e.safetensors"
    monkeypatch.setattr(sys, "argv", ["new_names.py", str(file), str(file), "--data", str(tmp_path)])
    run_main(new_names.main)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith(f"{file}: slots ")


def test_it_takes_a_fine_tuned_model(capsys, monkeypatch, tmp_path):
    (tmp_path / "devset.csv").write_text('mr,ref\n"name[Blue Spice], near[Burger King]",x\n')
    model = write_tiny_model(tmp_path / "run" / "model")
    monkeypatch.setattr(sys, "argv", ["new_names.py", str(tmp_path / "run"), "--data", str(tmp_path)])
    written = []
    monkeypatch.setattr(new_names, "generate", lambda model, *args, **options: written.append((model, options)) or [""])
    run_main(new_names.main)
    ((used, options),) = written
    assert used.folder == model and options["prefix"] is None
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: slots 0.0%, name 0.0%, near 0.0%, BLEU 0.0\n"
