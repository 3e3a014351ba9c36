"""Saving and reading the state of a training run, OUT/checkpoint.pt."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from minprefix.system.errors import InputError, OutOfMemory, out_of_memory
from minprefix.system.files import atomic_write

NEW_SETTINGS = {"group": 1, "accumulate": 1}  # that earlier checkpoints lack, with the values that they had
Log = list[dict[str, float]]  # rows: see `training.train`


def save_checkpoint(out: Path, state: dict[str, Any]) -> None:
    with atomic_write(out / "checkpoint.pt", "wb") as file:
        torch.save(state, file)


def read_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The dict that a run saved; InputError if the file is damaged, or was saved with other "settings"."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            if damaged := file.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, settings = ({**NEW_SETTINGS, **x} for x in (state["settings"], settings))
        differing = [key for key in {**settings, **saved} if saved.get(key) != settings.get(key)]
    except Exception as error:  # torch.load documents no closed list of errors for a damaged file
        if out_of_memory(error):
            raise too_little_memory(path) from error
        raise InputError(f"{path} cannot be resumed from, it is damaged: delete it to start again") from error
    for key in differing:
        hidden = key in ("model", "training data", "dev data")  # known by their digests only
        was = f"another {key}" if hidden else f"{key} = {saved.get(key)}, not {settings.get(key)}"
        train_on = f", or train on from its prefix: --init {path.parent}, and another --out" if key == "steps" else ""
        raise InputError(f"{path} is of a run with {was}: resume with the same settings{train_on}")
    return state


def too_little_memory(path: Path) -> OutOfMemory:
    return OutOfMemory(f"there is too little memory to resume from {path}, unless it is damaged: free some, try again")
