"""Command lines: a readable --help, and errors of one line."""

import argparse
from functools import partial
from typing import Any, NoReturn

from minprefix.system.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse's parser with a short usage line, and with errors raised as InputError."""

    def __init__(self, prog: str, description: str, epilog: str | None = None, what: str = "") -> None:
        """what: the positional argument in the usage line."""
        page = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=100)
        usage = f"%(prog)s {what} [OPTION ...]" if what else "%(prog)s [OPTION ...]"
        super().__init__(prog=prog, usage=usage, description=description, epilog=epilog, formatter_class=page)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help lists the options")


def add_device_options(group: argparse._ActionsContainer) -> None:
    devices, dtypes, add = ("auto", "cpu", "cuda", "mps"), ("auto", "float32", "bfloat16"), group.add_argument
    add("--device", choices=devices, metavar="NAME", default="auto", help="cpu, cuda or mps (%(default)s)")
    add("--dtype", choices=dtypes, metavar="TYPE", default="auto", help="float32 or bfloat16 (%(default)s)")


def flag(key: str) -> str:
    """The option whose value is args.KEY."""
    return f"--{key.replace('_', '-')}"


def fill_defaults(args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Set the options that the command line leaves open."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def check_above_zero(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """InputError if one of these options is given and is not above 0, or is absurdly large."""
    for key in keys:
        value = getattr(args, key)
        if value is not None and not 0 < value < 1e9:
            raise InputError(f"{flag(key)} is {value}: it must be above 0, and less than a billion")


def check_not_negative(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """InputError if one of these options is given and is below 0, or too large for a seed of torch."""
    for key in keys:
        given = getattr(args, key)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 0 <= value < 2**63:
                raise InputError(f"{flag(key)} is {value}: it must be at least 0, and less than 2 ** 63")


def check_requires(args: argparse.Namespace, needs: dict[str, str]) -> None:
    """InputError if an option is given without another that it needs. needs: option -> that other option."""
    for key, other in needs.items():
        if getattr(args, key) is not None and not getattr(args, other):
            raise InputError(f"{flag(key)} does nothing without {flag(other)}: leave it out, or give {flag(other)}")
