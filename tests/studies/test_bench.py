"""python -m minprefix bench: that it measures the work it names, prints what it promises, and refuses nonsense."""

import json
import subprocess
import sys
import time

import pytest
import torch

from minprefix import load_model, load_tokenizer
from minprefix.core.kernels import can_pack_bfloat16
from minprefix.studies import bench, bench_report, contenders
from minprefix.system.errors import InputError
from tests.helpers import call, singles
from tests.tiny import ROOT, write_tiny_bart, write_tiny_model

pytestmark = pytest.mark.slow

MR = "name[The Golden Lantern], eatType[pub], food[Thai]"
QUICK = ["--batch-size", "3", "--steps", "2", "--rounds", "1", "--hidden", "8", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_tiny_model(folder / "gpt2")
    write_tiny_bart(folder / "bart", decoder_attention_heads=4)
    for name in ("trainset", "testset_w_refs"):
        rows = "".join(f'"{MR}, near[Café {i}]","The Golden Lantern is a Thai pub {i}."\n' for i in range(12))
        (folder / f"{name}.csv").write_text("mr,ref\n" + rows, encoding="utf-8")
    return folder


def run(world, *options):
    command = [sys.executable, "-m", "minprefix", "bench", "--data", str(world), *QUICK, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)


def test_a_peer_that_is_not_installed_is_told_before_anything_is_measured(world, monkeypatch, capsys):
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "peft" else name)
    code, _, err = call(bench, capsys, "train", "--model", world / "gpt2", "--data", world, "--peer")
    assert code == 2 and err == "error: --peer needs transformers and PEFT: pip install -e '.[parity]'\n"


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
@pytest.mark.parametrize("what", ["train", "generate"])
def test_one_json_line_with_the_figures(world, what, kind):
    done = run(world, what, "--model", str(world / kind), "--json", "--new-tokens", "4", "--beams", "2")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    share = "share_of_matmul" if what == "train" else "share_of_bandwidth"
    assert all(row[key] > 0 for key in ("examples_per_s", "median_s", "first_s", "tokens_per_s", "peak_GiB"))
    assert row["compile_s"] >= 0 and row["recompiles"] == 0
    assert 0 <= row[share] < 1 and row["who"] == "minprefix"
    assert row["settings"]["batch_size"] == 3 and row["settings"]["dtype"] in ("bfloat16", "float32")


@pytest.mark.parametrize("what, kind", [("train", "gpt2"), ("generate", "gpt2"), ("generate", "bart")])
def test_a_sweep_and_the_peer(world, what, kind):
    pytest.importorskip("peft", reason="the peer, PEFT, is not installed")
    done = run(world, what, "--model", str(world / kind), "--json", "--peer", "--sweep", "prefix-length", "1", "6")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["who"] for row in rows] == ["transformers + PEFT", "minprefix"] * 2
    assert [row["settings"]["prefix_length"] for row in rows] == [1, 1, 6, 6]


@pytest.mark.skipif(not can_pack_bfloat16(), reason="oneDNN makes no bfloat16 products on this CPU")
def test_texts_are_timed_with_packed_weights(world, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "generate", "--model", str(world / "gpt2"), "--data", str(world), *QUICK,
                                      "--dtype", "bfloat16"])  # fmt: skip
    seen = []
    monkeypatch.setattr(
        contenders, "generate_ids", lambda model, *args, **options: seen.append(model.head.weight.packed)
    )
    write, _ = contenders.ours(bench.parse_args())
    write(0)
    assert len(seen) == 1


def test_useful_operations_are_those_of_rows_alone(world):
    """6 products a layer and the head for the forward pass, as many for the gradient of what they are given."""
    tokenizer, model = load_tokenizer(world / "gpt2"), load_model(world / "gpt2")
    pairs = [([5] * 9, [6] * 4), ([5] * 3, [6] * 8)]
    C, P, layers, V, total = 32, 5, 2, model.config["vocab_size"], 0
    for source, target in pairs:
        T, N = len(source) + len(target), len(target)
        weights = 2 * T * 12 * C * C
        scores = 2 * 2 * T * (T + P) * C  # queries with keys, weights with values
        # Backward: each score product twice; nothing flows into the first layer's input, so not through its c_attn.
        total += layers * (2 * weights + 3 * scores) - 2 * T * 3 * C * C + 2 * 2 * N * V * C
        total -= 2 * 2 * T * T * C + 2 * T * P * C  # in the first layer: no gradient of its keys, values and queries
    assert contenders.useful_flop(model, tokenizer, singles(pairs), P, ["decoder"]) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--threads", "-1"], "--threads is -1"),
        (["--hidden", "-1"], "--hidden is -1"),
        (["--sweep", "beams"], "--sweep beams"),
        (["--sweep", "model", "3"], "name one of"),
        (["--sweep", "beams", "x"], "numbers above 0"),
        (["--sweep", "beams", "0"], "numbers above 0"),
        (["--sweep", "hidden", "²"], "numbers above 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'.* --help lists the options"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_nonsense_is_refused(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["bench", "train", *options])
    with pytest.raises(InputError, match=message):
        bench.sweep(bench.parse_args())


def test_a_sweep_of_the_width_may_begin_without_an_mlp(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "train", "--sweep", "hidden", "0", "512"])
    assert [settings.hidden for settings in bench.sweep(bench.parse_args())] == [0, 512]


def test_a_worker_that_cannot_work_says_why(world):
    done = run(world, "train", "--model", "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: no model 'nowhere'")
    done = run(world, "generate", "--model", str(world / "gpt2"), "--new-tokens", "600")  # known in the first round
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "256" in done.stderr, done.stderr
    done = run(world, "train", "--model", str(world / "gpt2"), "--batch-size", "500")
    assert done.returncode == 2 and "too few for --batch-size 500" in done.stderr


def test_a_report_within_its_time(world, tmp_path, monkeypatch, capsys):
    """Of a model that is given and one that is made; what fails, or has no time, has a row that says so."""
    monkeypatch.setitem(bench_report.SHAPES, "bart-base", (1, 32, 2, 4101))
    monkeypatch.setattr(bench_report, "BART_WORK", [("train", {"batch_size": 2, "source_length": 20, "hidden": 8})])
    monkeypatch.setattr(bench_report, "GPT2_WORK", [("train", {"batch_size": 500}), ("generate", {"batch_size": 2})])
    options = ["--data", world, "--json", tmp_path / "report.json", "--steps", 1, "--rounds", 1, "--new-tokens", 2]
    options += ["--models", world / "gpt2", "bart-base", "--threads", 1, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench", "report", *map(str, options)])
    bench_report.main()
    head, _, columns, _, *table = capsys.readouterr().out.splitlines()
    assert head.startswith("cpu (") and len(table) == 3 and {row.count("|") for row in table} == {columns.count("|")}
    assert "too few for --batch-size 500" in table[0] and "| train, batch 2, prefix 5, sources of 20 |" in table[1]
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [str(world / "gpt2"), "bart-base", str(world / "gpt2")]
    assert "problem" in rows[0] and all(row["measured"][0]["examples_per_s"] > 0 for row in rows[1:])
    sys.argv += ["--minutes", "0.001"]
    bench_report.main()
    assert capsys.readouterr().out.count("time") >= 3


def test_a_measurement_ends_at_its_deadline(world, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "train", "--model", str(world / "gpt2"), "--data", str(world), *QUICK])
    with pytest.raises(InputError, match="not measured in the time"):
        bench.measure(bench.parse_args(), time.monotonic() + 0.1)


def test_the_bandwidth_counts_what_a_step_reads(world):
    gpt2, bart = (load_model(world / kind, dtype=torch.bfloat16) for kind in ("gpt2", "bart"))
    assert contenders.bytes_of_a_step(gpt2) == 2 * (2 * 12 * 32 * 32 + 4096 * 32)
    assert contenders.bytes_of_a_step(bart) == 2 * (8 * 32 * 32 + 2 * 32 * 48 + 4100 * 32)
