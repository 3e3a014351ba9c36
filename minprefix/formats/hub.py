"""Models by name: in `weights/`, in HuggingFace's cache, or from its hub into `weights/`."""

import contextlib
import difflib
import os
import re
import sys
import urllib.error
from pathlib import Path
from urllib.parse import quote

from minprefix.formats.download import fetch
from minprefix.formats.safetensors import WEIGHT_FILES, read_index, read_object
from minprefix.system.errors import InputError
from minprefix.system.files import locked, read_text

CHECKOUT = Path(__file__).resolve().parents[2] / "weights"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
WEIGHTS = CHECKOUT if (CHECKOUT / "README.md").is_file() else CACHE / "minprefix" / "weights"  # installed on its own
KINDS = ("gpt2", "bart")
# Names from before the hub had owners, which it still knows: the same model may be in the cache under either.
OWNERS = {
    "gpt2": "openai-community", "gpt2-medium": "openai-community", "gpt2-large": "openai-community",
    "gpt2-xl": "openai-community", "distilgpt2": "distilbert",
}  # fmt: skip


def resolve_model(name: str | Path) -> Path:
    """The folder of a model: `name` is a path to one, or a model's name.

    A name is looked for in `weights/` (with the bundled models), then in HuggingFace's cache, then on the hub, from
    where it is downloaded to `weights/`. InputError if it is nowhere.
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
        return download_model(str(name), WEIGHTS / name)
    except urllib.error.HTTPError as error:
        raise InputError(f"{absent}; {endpoint()} answers {error.code} {error.reason}: {advice(error.code)}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        advise = "give a model's folder, or set HF_ENDPOINT to a mirror"
        raise InputError(f"{absent}, and {endpoint()} cannot be reached ({reason}): {advise}") from error


def is_on(variable: str) -> bool:
    """Whether an environment variable is set to yes, by the rules of huggingface_hub."""
    return (os.environ.get(variable) or "").upper() in ("1", "ON", "YES", "TRUE")


def advice(code: int) -> str:
    if code not in (401, 403):
        return "check the name"
    token, where = user_token()
    sent = f" (what {where} holds was sent)" if token else ""  # an expired one is refused for public models, too
    return f"check the name; for a private or gated model, set HF_TOKEN to a token that may read it{sent}"


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
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{hub_home()}/hub"
    return expanded(cache)


def hub_home() -> Path:
    return expanded(os.environ.get("HF_HOME") or CACHE / "huggingface")


def expanded(path: str | Path) -> Path:
    """With ~ and $VARIABLES filled in."""
    return Path(os.path.expandvars(os.path.expanduser(path)))


def is_complete(folder: Path) -> bool:
    """Whether a folder has all files that a model needs."""

    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    if not has("config.json") or not (has("vocab.json", "merges.txt") or has("tokenizer.json")):
        return False
    for weights in WEIGHT_FILES:
        if has(weights):
            return True
        if has(f"{weights}.index.json"):
            with contextlib.suppress(InputError):
                return has(*read_index(folder / f"{weights}.index.json").values())
            return False
    return False


# ---- the hub: ENDPOINT/NAME/resolve/REVISION/FILE ----


def endpoint() -> str:
    url = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w.~/-]*)?", url, re.A):
        raise InputError(f"HF_ENDPOINT is {url!r:.200}: expected an address like https://huggingface.co")
    return url


def download_model(name: str, folder: Path) -> Path:
    """Download a model of the hub to a folder, which appears whole or not at all.

    The files are collected in .NAME.part beside it, where the next try finds what an interrupted one has got. Of
    several processes that want the model, one downloads it and the others wait.
    """
    part = folder.with_name(f".{folder.name}.part")
    try:
        with locked(part, wait=f"waiting for another process that downloads to {part}"):
            try:
                if not folder.is_dir():
                    print(f"downloading {name} from {endpoint()} to {folder}", file=sys.stderr)
                    files = fetch_model(name, part)
                    for file_name, path in files.items():
                        path.rename(part / file_name)
                    for path in part.iterdir():
                        if path.name not in files:  # of an earlier try, whose files were others
                            path.unlink()
                    part.rename(folder)
            finally:
                for empty in (part, folder.parent):
                    with contextlib.suppress(OSError):  # it is not empty, or gone
                        empty.rmdir()
    except (urllib.error.URLError, TimeoutError):
        raise
    except OSError as error:
        raise InputError(f"cannot write {part}: {error.strerror}") from error
    return folder


def fetch_model(name: str, part: Path) -> dict[str, Path]:
    """Download the files of a model that minprefix needs, and check them: file name -> path, still with a .part name.

    All files are of the same commit: that of `main` when config.json arrives.
    """
    url, headers = f"{endpoint()}/{full_name(name)}/resolve", {"User-Agent": "minprefix", **authorization()}
    config, answers = fetch(f"{url}/main/config.json", part / "config.json", headers)
    kind = read_object(config).get("model_type")
    if kind not in KINDS:
        raise InputError(f"{name} on the hub is a {kind!r:.100} model, minprefix runs {' and '.join(KINDS)}")
    commit = next((answer["X-Repo-Commit"] for answer in answers if answer["X-Repo-Commit"]), "main")
    files = {"config.json": config}

    def get(file_name: str) -> bool:
        """Download a file if the model has it -> whether it has."""
        try:
            files[file_name] = fetch(f"{url}/{quote(commit)}/{quote(file_name)}", part / file_name, headers)[0]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
        return file_name in files

    get("generation_config.json")
    if not (get("vocab.json") and get("merges.txt") or get("tokenizer.json")):
        raise InputError(f"{name} on the hub has no tokeniser: neither vocab.json and merges.txt nor tokenizer.json")
    for weights in WEIGHT_FILES:
        if get(weights):
            return files
        if get(f"{weights}.index.json"):
            for shard in sorted(set(read_index(files[f"{weights}.index.json"]).values())):
                if not get(shard):
                    raise InputError(f"{name} on the hub lacks {shard!r:.200}, which its {weights}.index.json lists")
            return files
    raise InputError(f"{name} on the hub has no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or in shards")


def authorization() -> dict[str, str]:
    """The header with the user's token, if there is one; it goes to no other host than the endpoint."""
    token, where = user_token()
    if not re.fullmatch("[!-~]*", token):
        raise InputError(f"the token in {where} has blanks or other characters that none has: correct or remove it")
    return {"Authorization": f"Bearer {token}"} if token else {}


def user_token() -> tuple[str, str]:
    """The user's token ("" for none), and the variable or file that it is from, looked for as huggingface_hub does."""
    if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return "", "nothing"
    variable = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "HUGGING_FACE_HUB_TOKEN"  # the old name
    if token := without_line_ends(os.environ.get(variable, "")):
        return token, variable
    path = expanded(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token")  # what `hf auth login` writes
    return without_line_ends(read_text(path)) if os.path.exists(path) else "", str(path)


def without_line_ends(token: str) -> str:
    return token.replace("\r", "").replace("\n", "").strip()
