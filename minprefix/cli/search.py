"""How a task's texts are searched for, by default and as the command line says."""

import math
from typing import Any

from minprefix.data.tasks import SUMMARISATION, TASKS, TRIPLES


def recipe(task: str) -> dict[str, Any]:
    """How a task's texts are usually searched for: options of `Search`, and `one_line` of `generate`.

    Summaries: as BART's authors decode XSum (Lewis et al. 2020), with the length penalty of the paper's runs. All else:
    the beam search of the paper's table-to-text; 3% of WebNLG's texts have more than 64 GPT-2 tokens, hence the 100.
    """
    if task in SUMMARISATION:
        return {"beams": 6, "length_penalty": 0.8, "no_repeat_ngram": 3, "min_new_tokens": 10, "max_new_tokens": 60,
                "one_line": True}  # fmt: skip
    return {"beams": 5, "length_penalty": 1.0, "no_repeat_ngram": 0, "min_new_tokens": 0,
            "max_new_tokens": 100 if task in TRIPLES else 64, "one_line": task in TASKS}  # fmt: skip


def search_options(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """The task's `recipe` with those of its options replaced that are given (not None).

    Two defaults depend on what is given: with "sample" there is 1 beam, and where fewer new tokens are allowed than the
    recipe's minimum, that minimum is lowered to them.
    """
    options = {**recipe(task), **({"beams": 1} if given.get("sample") else {})}
    given = {key: given[key] for key in options if given.get(key) is not None}
    options["min_new_tokens"] = min(options["min_new_tokens"], given.get("max_new_tokens", math.inf))
    return {**options, **given}
