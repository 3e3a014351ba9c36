"""Models by name: in `weights/`, in HuggingFace's cache, or from its hub into that cache by huggingface_hub."""

import contextlib
import difflib
import os
import re
import sys
from pathlib import Path

from minprefix.formats.safetensors import WEIGHT_FILES, read_index, read_object
from minprefix.system.errors import NO_ROOM, InputError, WriteError

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
KINDS = ("gpt2", "bart")
SMALL_FILES = [
    "config.json", "generation_config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
]  # fmt: skip
# Names from before the hub had owners, which it still knows: the same model may be in the cache under either.
OWNERS = {
    "gpt2": "openai-community", "gpt2-medium": "openai-community", "gpt2-large": "openai-community",
    "gpt2-xl": "openai-community", "distilgpt2": "distilbert",
}  # fmt: skip


def resolve_model(name: str | Path) -> Path:
    """The folder of a model: `name` is a path to one, or a model's name.

    A name is looked for in `weights/` (with the bundled models), then in HuggingFace's cache, then on the hub, from
    where it is downloaded to that cache. InputError if it is nowhere.
    """
    if os.path.isfile(name):
        raise InputError(f"{name} is a file: give the model's folder instead")
    if name and os.path.isdir(name):
        return Path(name)
    configs = [*WEIGHTS.glob("[!.]*/config.json"), *WEIGHTS.glob("[!.]*/[!.]*/config.json")]  # NAME, OWNER/NAME
    there = sorted(str(path.parent.relative_to(WEIGHTS)) for path in configs)
    meant = difflib.get_close_matches(str(name), [known for known in (*there, *OWNERS) if known != str(name)], n=1)
    absent = f"no model {str(name)!r}{f' (did you mean {meant[0]}?)' if meant else ''}: there is neither such a folder "
    absent += f"nor one in {WEIGHTS} (which has: {', '.join(there) or 'none'})"
    if not is_hub_name(str(name)):
        raise InputError(absent)
    if folder := find_model(str(name)):
        return folder
    absent += f" nor a complete one in HuggingFace's cache {hub_cache()}"
    if is_on("HF_HUB_OFFLINE") or is_on("TRANSFORMERS_OFFLINE"):
        raise InputError(f"{absent}, and HF_HUB_OFFLINE forbids a download: unset it, or give a model's folder")
    try:
        return download_model(full_name(str(name)))
    except InputError as error:
        raise type(error)(f"{absent}; {error}") from error


def is_on(variable: str) -> bool:
    """Whether an environment variable is set to yes, by the rules of huggingface_hub."""
    return (os.environ.get(variable) or "").upper() in ("1", "ON", "YES", "TRUE")


def model_name(folder: str | Path) -> str | None:
    """The name by which `resolve_model` finds a folder in `weights/` or HuggingFace's cache; None for one elsewhere."""
    folder = Path(folder).resolve()
    cached = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    for name in (folder.name, f"{folder.parent.name}/{folder.name}", cached):
        found = find_model(name) if is_hub_name(name) else None
        if found and found.resolve() == folder:
            return name
    return None


def is_hub_name(name: str) -> bool:
    """Whether it has the form NAME or OWNER/NAME of the hub's names, which cannot lead out of a folder as a path."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return len(name) <= 96 and bool(re.fullmatch(f"(?:{part}/)?{part}", name, re.A)) and not re.search(r"--|\.\.", name)


def find_model(name: str) -> Path | None:
    """The folder of a model's name in `weights/`, or else a complete snapshot in HuggingFace's cache, or None."""
    if (WEIGHTS / name).is_dir():
        return WEIGHTS / name
    bare = name.rpartition("/")[2]
    for owned in dict.fromkeys([name, full_name(name), *([bare] if full_name(bare) == name else [])]):
        repository = hub_cache() / f"models--{owned.replace('/', '--')}"
        if not os.path.isfile(repository / "refs" / "main"):
            continue
        with contextlib.suppress(OSError, ValueError):  # it may not be read; it is no text
            commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
            if re.fullmatch("[0-9a-f]{40}", commit) and is_complete(repository / "snapshots" / commit):
                return repository / "snapshots" / commit
    return None


def full_name(name: str) -> str:
    return f"{OWNERS[name]}/{name}" if name in OWNERS else name


def hub_cache() -> Path:
    """Where huggingface_hub keeps its downloads."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def is_complete(folder: Path) -> bool:
    """Whether a folder has all files that a model needs."""
    if not has_files(folder, "config.json"):
        return False
    if not has_files(folder, "vocab.json", "merges.txt") and not has_files(folder, "tokenizer.json"):
        return False
    for weights in WEIGHT_FILES:
        if has_files(folder, weights):
            return True
        if has_files(folder, f"{weights}.index.json"):
            with contextlib.suppress(InputError):
                return has_files(folder, *read_index(folder / f"{weights}.index.json").values())
            return False
    return False


def has_files(folder: Path, *names: str) -> bool:
    return all((folder / name).is_file() for name in names)


# ---- the hub ----


def download_model(repository: str) -> Path:
    """Download a model of the hub to HuggingFace's cache, and return its folder there.

    Files that are there already are not downloaded again. config.json comes first, so that a model of another kind is
    refused before its weights arrive.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise InputError(f"the download needs huggingface_hub ({error}): pip install -e '.[hub]'") from error
    cache = hub_cache()
    print(f"downloading {repository} to {cache}", file=sys.stderr)
    try:
        # Without a network this fails, where snapshot_download would return what part of the model is in the cache.
        files = needed_files([file.rfilename for file in HfApi().model_info(repository).siblings or []])
        folder = Path(snapshot_download(repository, cache_dir=cache, allow_patterns="config.json"))
        kind = read_object(folder / "config.json").get("model_type")
        if kind not in KINDS:
            raise InputError(f"{repository} is a {kind!r:.100} model, minprefix runs {' and '.join(KINDS)}")
        return Path(snapshot_download(repository, revision=folder.name, cache_dir=cache, allow_patterns=files))
    except InputError:
        raise
    except Exception as error:  # the package's own, those of its HTTP client, OSError
        raise download_error(repository, error) from error


def needed_files(names: list[str]) -> list[str]:
    """Those files of a repository that minprefix needs: safetensors if it has them, else `.bin`, whole or in shards."""
    small = [name for name in SMALL_FILES if name in names]
    if "config.json" not in small or not ({"vocab.json", "merges.txt"} <= {*small} or "tokenizer.json" in small):
        raise InputError("the hub's model lacks config.json, or vocab.json and merges.txt, or tokenizer.json")
    for weights in WEIGHT_FILES:
        if weights in names:
            return [*small, weights]
        if f"{weights}.index.json" in names:
            stem, ending = weights.split(".")
            return [*small, f"{weights}.index.json", f"{stem}-*.{ending}"]
    raise InputError(f"the hub's model lacks weights: neither {' nor '.join(WEIGHT_FILES)}, whole or in shards")


def download_error(repository: str, error: BaseException) -> InputError:
    """What stopped huggingface_hub, as one line: what, where, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # in the cache, after the hub has failed
        error = error.__cause__ or error
    where = f"{constants.ENDPOINT}/{repository}"
    token = "set HF_TOKEN, or run `hf auth login`"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{where} is gated: accept its terms there, then {token}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{where} has no revision main: give the folder of another copy of the model")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return InputError(f"{where} does not exist, or is private: check the name; for a private model, {token}")
    if status in (401, 403):
        remedy = "check the name, and correct or remove the token (HF_TOKEN, or that of `hf auth login`)"
        return InputError(f"{where} refuses access ({status}): {remedy}")
    if isinstance(error, OSError) and (error.filename or error.errno in NO_ROOM):
        place = error.filename or hub_cache()
        return WriteError(f"cannot write {place}: {error.strerror}; make room, or set HF_HUB_CACHE to another folder")
    reason = re.sub(r"Bearer [^'\"]*", "Bearer ...", f"{type(error).__name__}: {error}")
    remedy = "check the network, set HF_ENDPOINT to a mirror, or give a model's folder; complete files are kept"
    return InputError(f"the download of {where} failed ({reason:.300}): {remedy}")
