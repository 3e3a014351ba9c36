"""Texts and their scores: a task's metrics over a test set; texts before and after training, next to each other."""

import json
from pathlib import Path
from typing import Any

from minprefix import metrics
from minprefix.core.encode import Example
from minprefix.core.generate import generate
from minprefix.core.model import Model
from minprefix.core.prefix_kv import KVPrefix
from minprefix.data.tasks import SUMMARISATION, find_e2e
from minprefix.formats.load import load_model, pick_writing_dtype
from minprefix.formats.tokenizer import Tokenizer
from minprefix.methods.files import load_trained
from minprefix.metrics.slots import slot_accuracy
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

NAMES = {  # method -> the texts before training and those after it
    "prefix": ("without the prefix", "with the prefix"),
    "finetune": ("before fine-tuning", "after fine-tuning"),
    "top2": ("before fine-tuning", "after fine-tuning"),
    "adapter": ("without adapters", "with adapters"),
    "embedding": ("without virtual tokens", "with virtual tokens"),
    "infix": ("without the infix", "with the infix"),
}

# ---- a test set ----


def check_scorable(task: str, examples: list[Example]) -> None:
    """InputError if texts for these examples could not be scored: said before they are written."""
    if lacking := [number for number, example in enumerate(examples, 1) if not example.references]:
        remedy = "use --task with a split, or a .jsonl file with targets"
        raise InputError(f"--evaluate needs references, input {lacking[0]} has none: {remedy}")
    if task in SUMMARISATION:
        metrics.rouge_scorer()  # says which package is missing


def evaluate(task: str, examples: list[Example], texts: list[str], path: Path, settings: dict[str, Any]) -> None:
    """Score the texts, print the scores, those of summaries with intervals, and write them to `path` as JSON."""
    references = [example.references for example in examples]
    if task in SUMMARISATION:
        scores, intervals = metrics.summary_score(texts, references)
    else:
        scores, intervals = metrics.score(texts, references), {}
        if task == "e2e":
            scores.update(slot_accuracy([example.source for example in examples], texts))
    bounds = {metric: f" [{low:.4f}, {high:.4f}]" for metric, (low, high) in intervals.items()}
    result = {"scores": scores, "intervals": intervals, "inputs": len(texts), "settings": settings}
    if is_sample(settings.get("task"), settings.get("data")):
        print("the scores are of the bundled sample, not of E2E: give --data the folder of its files")
        result["test set"] = "the bundled sample, not E2E"
    print("  ".join(f"{metric} {value:.4f}{bounds.get(metric, '')}" for metric, value in scores.items()))
    with atomic_write(path) as file:
        json.dump(result, file, indent=2, default=str)


def is_sample(task: str | None, data: str | None) -> bool:
    """Whether a task's examples are those of the bundled sample, because there are no E2E files."""
    return task == "e2e" and find_e2e(data) is None


# ---- before and after training ----


def load_before_after(
    method: str, path: Path, model: Model, base: Path, device: str, dtype_name: str
) -> tuple[Model, Model, KVPrefix | None]:
    """The model as it was before training, the model after it, and the prefix that the latter takes.

    What was trained is read back from its file, `path`. model: the one that was trained with; base: its folder.
    dtype_name: see `pick_writing_dtype`, which sample.py asks too.
    """
    dtype = pick_writing_dtype(dtype_name, device, base)
    frozen = method in ("prefix", "embedding", "infix")
    before = model if frozen and model.head.weight.dtype == dtype else load_model(base, device, dtype)
    if method == "finetune":
        return before, load_model(path, device, dtype), None
    after = before if frozen else load_model(base, device, dtype)
    return before, after, load_trained(path, after)  # adapters and top layers change the model


def compare(
    names: tuple[str, str], before: Model, after: Model, prefix: KVPrefix | None, tokenizer: Tokenizer,
    test: list[Example], task: str, data: str | None, max_source: int | None, search: dict[str, Any],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Write texts for the test inputs with both models (see `load_before_after`), print the first ones and the scores.

    -> name -> scores; no scores where a package for them is missing.
    """
    texts: dict[str, list[str]] = {}
    sources = [example.source for example in test]
    for name, model, its_prefix in (names[0], before, None), (names[1], after, prefix):
        print(f"\nwriting {len(sources)} texts for held-out inputs {name}, {search['beams']} beams")
        what = None if texts else "test sources"  # that sources are cut is said once
        texts[name] = generate(
            model, tokenizer, sources, its_prefix, max_source=max_source, what=what, progress=True, **search
        )
    shown = {"input": sources[0][:600], names[0]: texts[names[0]][0][:200], names[1]: texts[names[1]][0],
             "reference": test[0].references[0]}  # fmt: skip
    width = max(map(len, shown))
    print("\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in shown.items()))
    try:
        scores = {name: quick_scores(task, texts[name], [example.references for example in test]) for name in names}
    except InputError as error:
        print(error)
        return {name: {} for name in names}
    what = "the bundled sample, not E2E" if is_sample(task, data) else f"{task}, {len(sources)} test inputs"
    for metric, value in scores[names[1]].items():
        print(f"{metric} on {what}: {scores[names[0]][metric]:.3f} {names[0]}, {value:.3f} {names[1]}")
    return scores


def quick_scores(task: str, texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU, or for summaries ROUGE; InputError if its package is missing."""
    if task not in SUMMARISATION:
        return {"BLEU": metrics.bleu(texts, references)}
    return metrics.summary_score(texts, references)[0]
