"""torch.compile for a few functions on large tensors, where it can be had: on CPU it needs a C++ compiler."""

import functools
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

WORTH_IT = 2**19  # elements, of a function's first argument: on fewer, compiling gains nothing
T = TypeVar("T")


@functools.cache
def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function, compiled at its first call on a large tensor, for all sizes at once; as it is where that fails."""
    fast = torch.compile(function, dynamic=True)
    works = None  # not known yet

    def call(*args: Tensor) -> T:
        nonlocal works
        if works is False or args[0].numel() < WORTH_IT:
            return function(*args)
        try:
            result = fast(*args)
        except Exception as error:  # of nearly any kind: no compiler, a broken one, a folder that cannot be written
            if works:
                raise
            works = False
            reason = " ".join(str(error).split())
            print(f"torch.compile does not work here, so training is slower ({reason:.200})", file=sys.stderr)
            return function(*args)
        works = True
        return result

    return call
