"""Command lines: a --help that reads as a page, and mistakes that are one line like all others."""

import argparse
from functools import partial
from typing import Any, NoReturn

from minprefix.system.errors import InputError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


class Parser(argparse.ArgumentParser):
    """argparse's, but for the usage (all options, a wall) and for errors, which are raised as InputError."""

    def __init__(self, prog: str, description: str, epilog: str | None = None, what: str = "") -> None:
        """what: the name in the usage of the argument that comes first."""
        page = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=100)
        usage = f"%(prog)s {what} [OPTION ...]" if what else "%(prog)s [OPTION ...]"
        super().__init__(prog=prog, usage=usage, description=description, epilog=epilog, formatter_class=page)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the options")


def flag(key: str) -> str:
    """The option of a key of the parsed arguments."""
    return f"--{key.replace('_', '-')}"


def fill_defaults(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Put defaults in where the command line said nothing."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def check_above_zero(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """InputError if one of these options is given and not above 0, or so large that no machine could follow."""
    for key in keys:
        value = getattr(args, key)
        if value is not None and not 0 < value < 1e9:
            raise InputError(f"{flag(key)} is {value}: it must be above 0, and less than a billion")


def check_not_negative(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """InputError if one of these options is given and below 0, or too large for a seed of torch's."""
    for key in keys:
        given = getattr(args, key)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 <= value < 2**63:
                raise InputError(f"{flag(key)} is {value}: it must be at least 0, and less than 2 ** 63")


def check_requires(args: argparse.Namespace, needs: dict[str, str]) -> None:
    """InputError if an option is given that does nothing without another: option -> that other one."""
    for key, other in needs.items():
        if getattr(args, key) is not None and not getattr(args, other):
            zero = type(getattr(args, other)) is int
            lacking = f"with {flag(other)} 0" if zero else f"without {flag(other)}"
            raise InputError(f"{flag(key)} does nothing {lacking}: leave it out, or give {flag(other)}")
