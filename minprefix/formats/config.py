"""What both models ask of a HuggingFace `config.json`: sizes that make sense, an activation that is known."""

from collections.abc import Iterable
from typing import Any

from minprefix.core.linear import ACTIVATIONS
from minprefix.system.errors import InputError


def check_sizes(config: dict[str, Any], keys: Iterable[str], kind: str) -> dict[str, int]:
    """The sizes under these keys as a dict; InputError unless all are positive integers of a sane magnitude."""
    sizes: dict[str, Any] = {key: config.get(key) for key in keys}
    for key, size in sizes.items():
        most = 1000 if "layer" in key else 2**24  # far above any such model, low enough to fail fast
        if type(size) is not int or not 0 < size <= most:
            raise InputError(f"config.json of the {kind} model: {key} is {size!r}, expected an integer in 1..{most}")
    return sizes


def check_heads(sizes: dict[str, int], width: str, heads: str) -> None:
    """InputError unless the width under one key is a multiple of the number of heads under the other."""
    if sizes[width] % sizes[heads]:
        raise InputError(f"config.json: {width} {sizes[width]} is not a multiple of {heads} {sizes[heads]}")


def check_activation(name: object) -> None:
    """InputError unless it is one of `ACTIVATIONS`."""
    if name not in list(ACTIVATIONS):  # a list, since JSON's value need not be hashable
        raise InputError(f"config.json: activation {name!r} is not supported, only {', '.join(ACTIVATIONS)}")


def check_switches(config: dict[str, Any], switches: dict[str, bool]) -> None:
    """InputError where the config asks for a variant that is not implemented: key -> the only value that is."""
    for key, value in switches.items():
        if config.get(key, value) is not value:
            raise InputError(f"config.json: {key} = {config[key]!r} is not supported by minprefix")


def check_booleans(config: dict[str, Any], keys: Iterable[str]) -> None:
    """InputError unless the values under these keys are true or false."""
    for key in keys:
        if not isinstance(config[key], bool):
            raise InputError(f"config.json: {key} is {config[key]!r}, true or false is needed")
