"""How texts are searched for: a task's defaults, and the options of the command line."""

import math
from typing import Any

from minprefix.data.tasks import SUMMARISATION, TASKS, TRIPLES


def recipe(task: str) -> dict[str, Any]:
    """A task's default options of `Search`, and `one_line` of `generate`.

    Summaries are decoded as BART's authors decode XSum (Lewis et al. 2020), with the length penalty of the paper's
    runs; other tasks with the paper's beam search for table-to-text. 100 tokens: 3% of WebNLG's texts exceed 64.
    """
    if task in SUMMARISATION:
        return {"beams": 6, "length_penalty": 0.8, "no_repeat_ngram": 3, "min_new_tokens": 10, "max_new_tokens": 60,
                "one_line": True}  # fmt: skip
    return {"beams": 5, "length_penalty": 1.0, "no_repeat_ngram": 0, "min_new_tokens": 0,
            "max_new_tokens": 100 if task in TRIPLES else 64, "one_line": task in TASKS}  # fmt: skip


def search_options(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """The task's `recipe`, with those of its options replaced that are given (not None).

    With "sample" the default is 1 beam. A "max_new_tokens" below the recipe's minimum lowers that minimum.
    """
    options = {**recipe(task), **({"beams": 1} if given.get("sample") else {})}
    given = {key: given[key] for key in options if given.get(key) is not None}
    options["min_new_tokens"] = min(options["min_new_tokens"], given.get("max_new_tokens", math.inf))
    return {**options, **given}
