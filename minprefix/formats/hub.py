"""Models by name: in `weights/`, in HuggingFace's cache, or downloaded to that cache by huggingface_hub."""

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
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
# Models that the hub knows by a name without an owner, too. They may be in the cache under either name.
OWNERS = {
    "gpt2": "openai-community", "gpt2-medium": "openai-community", "gpt2-large": "openai-community",
    "gpt2-xl": "openai-community", "distilgpt2": "distilbert",
}  # fmt: skip


def resolve_model(name: str | Path) -> Path:
    """The folder of a model; `name` is the path of a folder or a model's name.

    A name is searched for in `weights/` (which has the bundled models), then in HuggingFace's cache, then on the hub,
    from which the model is downloaded to that cache. InputError if it is not found.
    """
    if os.path.isfile(name):
        raise InputError(f"{name} is a file: give the model's folder instead")
    if name and os.path.isdir(name):
        return Path(name)
    configs = [*WEIGHTS.glob("[!.]*/config.json"), *WEIGHTS.glob("[!.]*/[!.]*/config.json")]  # NAME, OWNER/NAME
    bundled = sorted(str(path.parent.relative_to(WEIGHTS)) for path in configs)
    similar = difflib.get_close_matches(str(name), [known for known in (*bundled, *OWNERS) if known != str(name)], n=1)
    problem = f"no model {str(name)!r}{f' (did you mean {similar[0]}?)' if similar else ''}: there is neither such a "
    problem += f"folder nor one in {WEIGHTS} (which has: {', '.join(bundled) or 'none'})"
    if not is_hub_name(str(name)):
        raise InputError(problem)
    if folder := find_model(str(name)):
        return folder
    problem += f" nor a complete one in HuggingFace's cache {hub_cache()}"
    if is_on("HF_HUB_OFFLINE") or is_on("TRANSFORMERS_OFFLINE"):
        raise InputError(f"{problem}, and HF_HUB_OFFLINE forbids a download: unset it, or give a model's folder")
    try:
        return download_model(full_name(str(name)))
    except InputError as error:
        raise type(error)(f"{problem}; {error}") from error


def is_on(variable: str) -> bool:
    """Whether an environment variable is set to a true value, by the rules of huggingface_hub."""
    return (os.environ.get(variable) or "").upper() in ("1", "ON", "YES", "TRUE")


def model_name(folder: str | Path) -> str | None:
    """The name for which `resolve_model` returns this folder; None unless in `weights/` or HuggingFace's cache."""
    folder = Path(folder).resolve()
    cached = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    for name in (folder.name, f"{folder.parent.name}/{folder.name}", cached):
        found = find_model(name) if is_hub_name(name) else None
        if found and found.resolve() == folder:
            return name
    return None


def is_hub_name(name: str) -> bool:
    """Whether a name is valid on the hub, NAME or OWNER/NAME; used as a path, such a name stays inside a folder."""
    part = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
    return len(name) <= 96 and bool(re.fullmatch(f"(?:{part}/)?{part}", name, re.A)) and not re.search(r"--|\.\.", name)


def find_model(name: str) -> Path | None:
    """The folder of this name in `weights/`, or its complete snapshot in HuggingFace's cache, or None."""
    if (WEIGHTS / name).is_dir():
        return WEIGHTS / name
    bare = name.rpartition("/")[2]
    for owned in dict.fromkeys([name, full_name(name), *([bare] if full_name(bare) == name else [])]):
        repository = hub_cache() / f"models--{owned.replace('/', '--')}"
        with contextlib.suppress(OSError, ValueError):  # missing, not readable, or not text
            commit = (repository / "refs" / "main").read_text(encoding="ascii").strip()
            if re.fullmatch("[0-9a-f]{40}", commit) and is_complete(repository / "snapshots" / commit):
                return repository / "snapshots" / commit
    return None


def full_name(name: str) -> str:
    return f"{OWNERS[name]}/{name}" if name in OWNERS else name


def hub_cache() -> Path:
    """The folder of huggingface_hub's downloads, from the same environment variables."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def is_complete(folder: Path) -> bool:
    """Whether a folder has all files that a model needs, and all shards of its weights."""
    try:
        files = needed_files([path.name for path in folder.iterdir() if path.is_file()])
        indices = [read_index(folder / name) for name in files if name.endswith(".index.json")]
    except (InputError, OSError):
        return False
    return all((folder / shard).is_file() for index in indices for shard in index.values())


# ---- the hub ----


def download_model(repository: str) -> Path:
    """Download a model from the hub to HuggingFace's cache, and return its folder there.

    Files in the cache are not downloaded again. config.json comes first, so that a model of an unsupported kind is
    refused before its weights are downloaded.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError as error:
        raise InputError(f"the download needs huggingface_hub ({error}): pip install -e '.[hub]'") from error
    cache = hub_cache()
    print(f"downloading {repository} to {cache}", file=sys.stderr)
    try:
        # Without a network this fails, whereas snapshot_download would return an incomplete folder of the cache.
        files = needed_files([file.rfilename for file in HfApi().model_info(repository).siblings or []])
        folder = Path(snapshot_download(repository, cache_dir=cache, allow_patterns="config.json"))
        kind = read_object(folder / "config.json").get("model_type")
        if kind not in KINDS:
            raise InputError(f"{repository} is a {kind!r:.100} model, minprefix runs {' and '.join(KINDS)}")
        return Path(snapshot_download(repository, revision=folder.name, cache_dir=cache, allow_patterns=files))
    except InputError:
        raise
    except Exception as error:  # huggingface_hub's exceptions, its HTTP client's, OSError
        raise download_error(repository, error) from error


def needed_files(names: list[str]) -> list[str]:
    """The names or patterns of the files that minprefix needs, weights as safetensors if possible, else as `.bin`.

    InputError if the files with these names are no complete model.
    """
    small = [name for name in ("config.json", "generation_config.json", *TOKENIZER_FILES) if name in names]
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
    """The InputError for an exception of huggingface_hub: what failed, where, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # the cause is the hub's error
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
        path = error.filename or hub_cache()
        return WriteError(f"cannot write {path}: {error.strerror}; make room, or set HF_HUB_CACHE to another folder")
    reason = re.sub(r"Bearer [^'\"]*", "Bearer ...", f"{type(error).__name__}: {error}")
    remedy = "check the network, set HF_ENDPOINT to a mirror, or give a model's folder; complete files are kept"
    return InputError(f"the download of {where} failed ({reason:.300}): {remedy}")
