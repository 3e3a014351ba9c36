"""train.py and sample.py on an encoder-decoder: the same commands, summaries by their own recipe and scores."""

import importlib.util
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

import sample
import train
from minprefix import load_prefix
from minprefix.formats.safetensors import read_safetensors
from tests.helpers import assert_one_clear_line, call
from tests.tiny import write_tiny_bart, write_tiny_model

pytestmark = pytest.mark.slow

needs_rouge_score = pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None, reason='needs rouge-score: pip install -e ".[eval]"'
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny BART, a tiny GPT-2, and SciTLDR's layout with one source of 10,000 tokens in train."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_bart(folder / "bart", forced_bos_token_id=0)
    write_tiny_model(folder / "gpt2")
    (folder / "own.jsonl").write_text("".join(f'{{"source": "s {i}", "target": "t {i}"}}\n' for i in range(20)))
    (folder / "scitldr").mkdir()
    for split, n in (("train", 12), ("dev", 4), ("test", 4)):
        sources = [["We count.", f"The count is {i}.\n"] for i in range(n)]
        if split == "train":
            sources[5] = ["long"] * 10_000
        rows = [{"source": source, "target": [f"It is {i}.", "We count."]} for i, source in enumerate(sources)]
        (folder / "scitldr" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def in_world(world, monkeypatch):
    monkeypatch.chdir(world)


COMMON = ("--model", "bart", "--task", "scitldr", "--data", "scitldr", "--steps", 4, "--eval-every", 2,
          "--prefix-length", 5, "--hidden", 16, "--device", "cpu", "--dtype", "float32")  # fmt: skip


@pytest.fixture(scope="module")
def trained(world):
    """What a run of train.py says: (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(world)
        patch.setattr(sys, "argv", ["train.py", *map(str, COMMON), "--eval-inputs", "2", "--out", "run"])
        train.main()
    return out.getvalue(), err.getvalue()


def test_a_run_trains_all_three_sites(trained):
    out, err = trained
    tensors, info = read_safetensors("run/prefix.safetensors")
    assert {site: tuple(kv.shape) for site, kv in tensors.items()} == {
        "encoder": (2, 2, 4, 5, 8), "decoder": (1, 2, 2, 5, 16), "cross": (1, 2, 2, 5, 16),
    }  # fmt: skip
    assert (info["task"], info["position_offset"], info["sequence"]) == ("scitldr", "5", "<s>{x}</s> -> <s>{y}</s>")
    assert "prefix of length 5 at encoder, decoder, cross: trains" in out
    log = [json.loads(line) for line in open("run/log.jsonl")]
    assert [row["step"] for row in log] == [0, 2, 4] and log[-1]["dev_loss"] < log[0]["dev_loss"]


def test_a_source_of_10000_tokens_is_cut_with_one_counted_warning(trained):
    assert trained[1].count("cut 1 of 12 train sources to their first 256 tokens\n") == trained[1].count("cut ") == 1


def test_the_line_that_train_prints_works(trained, capsys):
    line = trained[0].splitlines()[-1].split()
    assert line[:4] == ["python", "sample.py", "--prefix", "run/prefix.safetensors"]
    code, out, _ = call(sample, capsys, *line[2:])
    assert code == 0 and len(out.splitlines()) == 4 and "<s>" not in out


@needs_rouge_score
def test_summaries_are_scored_by_rouge(trained, capsys):
    assert "ROUGE-2 on scitldr, 2 test inputs" in trained[0]
    code, out, _ = call(sample, capsys, "--prefix", "run/prefix.safetensors", "--task", "scitldr", "--data", "scitldr",
                        "--evaluate")  # fmt: skip
    assert code == 0 and out.startswith("ROUGE-1 ") and "ROUGE-L" in out and "[" in out and "BLEU" not in out
    result = json.loads(open("run/texts-test.json").read())
    assert result["scores"].keys() == result["intervals"].keys() == {"ROUGE-1", "ROUGE-2", "ROUGE-L"}


def test_without_its_package_rouge_is_missed_before_the_work(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setattr(sample, "generate_scored", None)  # is not reached
    code, _, err = call(sample, capsys, "--prefix", "run/prefix.safetensors", "--task", "scitldr", "--data", "scitldr",
                        "--evaluate")  # fmt: skip
    assert code == 2 and err.startswith("error: ROUGE") and 'pip install -e ".[eval]"' in err


def test_texts_that_cannot_be_scored_are_shown_all_the_same(world, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    code, out, _ = call(train, capsys, *COMMON, "--eval-inputs", 1, "--beams", 1, "--out", "unscored")
    assert code == 0 and out.count("ROUGE of summaries needs rouge-score") == 1 and "with the prefix  " in out
    assert set(map(str, json.loads(open("unscored/result.json").read())["scores"].values())) == {"{}"}


def test_summaries_are_searched_for_as_bart_does_xsum(trained, capsys):
    common = ("--prefix", "run/prefix.safetensors", "--input", "We count. The count is 3.")
    default = call(sample, capsys, *common)
    explicit = ("--beams", 6, "--length-penalty", 0.8, "--no-repeat-ngram", 3, "--min-new-tokens", 10)
    assert default[0] == 0 and call(sample, capsys, *common, *explicit, "--max-new-tokens", 60) == default
    assert call(sample, capsys, *common, "--max-new-tokens", 4)[0] == 0  # less than the usual minimum


def test_sites_and_offset(capsys):
    code, out, _ = call(train, capsys, *COMMON, "--sites", "decoder", "--offset", 0, "--eval-inputs", 0, "--out", "one")
    prefix = load_prefix("one/prefix.safetensors")
    assert code == 0 and list(prefix.kv) == ["decoder"] and prefix.position_offset == 0


def test_where_sources_were_cut_is_remembered(capsys):
    assert call(train, capsys, *COMMON, "--max-source", 9, "--eval-inputs", 1, "--out", "short")[0] == 0
    common = ("--prefix", "short/prefix.safetensors", "--input", "We count one and two and three and four and five.")
    code, out, err = call(sample, capsys, *common)
    assert code == 0 and "cut 1 of 1 sources to their first 9 tokens" in err
    assert call(sample, capsys, *common, "--max-source", 9)[1] == out


def test_table_to_text_and_own_rows_work_as_with_gpt2(world, capsys):
    (world / "e2e").mkdir()
    for name in ("trainset", "devset", "testset_w_refs"):
        (world / "e2e" / f"{name}.csv").write_text("mr,ref\nname[The Mill],The Mill is here.\n")
    for task, score in ((("e2e", "--data", "e2e"), "BLEU on e2e"), (("own.jsonl",), "BLEU on own")):
        common = (*COMMON[:2], *COMMON[6:], "--eval-inputs", 1, "--out", "run-" + task[0])
        code, out, _ = call(train, capsys, *common, "--task", *task)
        assert code == 0 and score in out
        prefix = f"run-{task[0]}/prefix.safetensors"
        code, out, _ = call(sample, capsys, "--prefix", prefix, "--input", "name[The Mill]")
        assert code == 0 and len(out.splitlines()) == 1


BAD = {
    "GPT-2 given a BART prefix": (sample, "--prefix run/prefix.safetensors --model gpt2 --input x", "takes decoder"),
    "BART given a GPT-2 prefix": (sample, "--prefix gpt2.safetensors --model bart --input x", "decoder prefix has"),
    "no folder for XSum": (train, "--model bart --task xsum", "--data"),
    "an empty folder for XSum": (train, "--model bart --task xsum --data nothing", "nothing has no train split"),
    "an empty source": (train, "--model bart --task empty.jsonl", "empty.jsonl:2: source is empty"),
    "a site that is none": (train, "--model bart --task scitldr --data scitldr --sites nose --prefix-length 5", "nose"),
    "GPT-2 has no encoder": (train, "--model gpt2 --task own.jsonl --sites encoder", "only decoder"),
    "no room for text": (train, "--model bart --task scitldr --data scitldr --max-source 2", "at most 2 tokens"),
    "max source 0": (train, "--model bart --task scitldr --data scitldr --max-source 0", "--max-source is 0"),
    "targets too long": (
        train,
        "--model bart --task scitldr --data scitldr --prefix-length 253",
        "it is the target, which begins",
    ),
    "negative offset": (train, "--model bart --task scitldr --data scitldr --offset -1", "--offset is -1"),
    "GPT-2's tokeniser": (train, "--model mixed --task scitldr --data scitldr", "lacks <s>"),
    "repeats of -1": (sample, "--prefix run --input x --no-repeat-ngram -1", "no_repeat_ngram is -1"),
    "minimum above maximum": (sample, "--prefix run --input x --min-new-tokens 90", "min_new_tokens is 90"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, world, trained, capsys):
    if not (world / "nothing").exists():
        (world / "nothing").mkdir()
        (world / "empty.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": " ", "target": "b"}\n')
        write_tiny_bart(world / "mixed")
        for name in ("vocab.json", "merges.txt"):
            (world / "mixed" / name).write_bytes((world / "gpt2" / name).read_bytes())
        arguments = ("--model", "gpt2", "--task", "scitldr", "--data", "scitldr", "--max-source", 99, "--steps", 1)
        assert call(train, capsys, *arguments, "--eval-inputs", 0, "--out", "gpt2-run")[0] == 0
        (world / "gpt2.safetensors").write_bytes((world / "gpt2-run" / "prefix.safetensors").read_bytes())
    assert_one_clear_line(*BAD[case], capsys, world)
