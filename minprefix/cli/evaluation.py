"""Texts and their scores: a task's metrics over a test set; texts without and with what was trained, side by side."""

import json
from pathlib import Path
from typing import Any

import torch

from minprefix import metrics
from minprefix.core.batches import Example
from minprefix.core.generate import generate
from minprefix.core.model import Model
from minprefix.core.prefix_kv import KVPrefix
from minprefix.data.tasks import SUMMARISATION, find_e2e
from minprefix.formats.load import load_model
from minprefix.formats.tokenizer import Tokenizer
from minprefix.methods.files import load_trained
from minprefix.metrics.slots import slot_accuracy
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

Writer = tuple[Model, KVPrefix | None]
NOUNS = {"prefix": "the prefix", "finetune": "fine-tuning", "top2": "fine-tuning", "adapter": "adapters",
         "embedding": "virtual tokens", "infix": "the infix"}  # fmt: skip

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
    sample = is_sample(settings.get("task"), settings.get("data"))
    if sample:
        print("the scores are of the bundled sample, not of E2E: give --data the folder of its files")
    bounds = {metric: f" [{low:.4f}, {high:.4f}]" for metric, (low, high) in intervals.items()}
    print("  ".join(f"{metric} {value:.4f}{bounds.get(metric, '')}" for metric, value in scores.items()))
    with atomic_write(path) as file:
        result = {"scores": scores, "intervals": intervals, "inputs": len(texts), "settings": settings}
        result |= {"test set": "the bundled sample, not E2E"} if sample else {}
        json.dump(result, file, indent=2, default=str)


def is_sample(task: str | None, data: str | None) -> bool:
    """Whether a task's examples are those of the bundled sample, because there are no E2E files."""
    return task == "e2e" and find_e2e(data) is None


def quick_scores(task: str, texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU, or for summaries ROUGE; InputError if its package is missing."""
    if task not in SUMMARISATION:
        return {"BLEU": metrics.bleu(texts, references)}
    return metrics.summary_score(texts, references)[0]


# ---- without and with what was trained ----


def load_before_after(
    method: str, path: Path, model: Model, base: Path, device: str, dtype: torch.dtype
) -> dict[str, Writer]:
    """Those who write at the end of a run, without what was trained and with it: name -> (model, prefix).

    What was trained is read back from its file, `path`. model: the one that was trained with; base: its folder.
    """
    noun = NOUNS[method]
    before, after = ("before", "after") if noun == "fine-tuning" else ("without", "with")
    unchanged = method in ("prefix", "embedding", "infix")
    if not unchanged or model.head.weight.dtype != dtype:
        model = load_model(base, device, dtype)
    if method == "finetune":
        changed, prefix = load_model(path, device, dtype), None
    else:
        changed = model if unchanged else load_model(base, device, dtype)
        prefix = load_trained(path, changed)  # adapters and top layers change the model that it is loaded for
    return {f"{before} {noun}": (model, None), f"{after} {noun}": (changed, prefix)}


def compare(
    task: str, data: str | None, tokenizer: Tokenizer, writers: dict[str, Writer], test: list[Example],
    max_source: int | None, search: dict[str, Any],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Texts for the test inputs by both (see `load_before_after`): name -> scores, none if a package is missing.

    Prints the texts for the first input, and the scores.
    """
    sources, references = [e.source for e in test], [e.references for e in test]
    before, after = writers
    texts: dict[str, list[str]] = {}
    for name, (model, prefix) in writers.items():
        print(f"\nwriting {len(sources)} texts for held-out inputs {name}, {search['beams']} beams")
        what = "test sources" if name == before else None  # said once
        texts[name] = generate(
            model, tokenizer, sources, prefix, max_source=max_source, what=what, progress=True, **search
        )
    width = max(map(len, writers))
    print(f"\n{'input':<{width}}  {sources[0][:600]}\n{before:<{width}}  {texts[before][0][:200]}")
    print(f"{after:<{width}}  {texts[after][0]}\n{'reference':<{width}}  {references[0][0]}")
    scores: dict[str, dict[str, float]] = {name: {} for name in writers}
    try:
        scores = {name: quick_scores(task, texts[name], references) for name in writers}
    except InputError as error:
        print(error)
    what = "the bundled sample, not E2E" if is_sample(task, data) else f"{task}, {len(sources)} test inputs"
    for metric, value in scores[after].items():
        print(f"{metric} on {what}: {scores[before][metric]:.3f} {before}, {value:.3f} {after}")
    return scores
