"""Inspect a prefix file; convert it to and from PEFT's format: `python -m minprefix show|export|import`.

python -m minprefix show runs/mine/prefix.safetensors --input "name[Blue Spice], food[Thai]"
python -m minprefix export --prefix runs/mine/prefix.safetensors --to adapter/
python -m minprefix import --prefix adapter/ --to prefix.safetensors --model gpt2-medium
"""

import argparse
import json
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minprefix.cli.options import Parser
from minprefix.cli.search import recipe
from minprefix.core import bart, gpt2
from minprefix.core.attention import KV, attend
from minprefix.core.batches import Batch, collate
from minprefix.core.encode import encode_sources, encode_target
from minprefix.core.generate import generate
from minprefix.core.model import Model
from minprefix.core.prefix_kv import KVInfix, KVPrefix
from minprefix.data.tasks import format_source
from minprefix.formats.hub import model_name
from minprefix.formats.load import load_model
from minprefix.formats.peft import write_adapter
from minprefix.formats.prefix_file import KINDS, load_prefix, save_prefix
from minprefix.formats.tokenizer import Tokenizer, load_tokenizer
from minprefix.methods.files import find_trained, load_trained, read_trained, resolve_base_model, trained_max_source
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write

PEFT_GENERATE = """\
PEFT's forward uses it, but PEFT's generate leaves the prefix out (peft 0.21.2 with transformers 5.24.0); for texts call
  model.get_base_model().generate(input_ids=ids, past_key_values=model.get_prompt(len(ids) * num_beams), ...)
For GPT-2, an attention_mask that is given must begin with a one for each virtual token."""
SHADES = " ░▒▓█"


def parse_args() -> argparse.Namespace:
    prog = "python -m minprefix"
    parser = Parser(prog, __doc__, what="COMMAND")
    commands = parser.add_subparsers(prog=prog, dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> Any:
        """A new command -> the function that adds its arguments."""
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.").add_argument

    add = command("show", "print what a prefix is, and how much attention it gets")
    add("prefix", type=Path, metavar="FILE", help="what train.py saved, its run's folder, or a PEFT folder")
    add("--model", help="the base model's folder or name (default: the one that the file names)")
    add("--input", metavar="TEXT", help="a source: map the attention that the prefix gets on it, by layer and head")
    add("--plot", type=Path, metavar="FILE.png", help="with --input: draw the map, too")
    add = command("export", "write a prefix as a PEFT adapter")
    add("--prefix", type=Path, required=True, help="a prefix file, or the folder of the run that trained it")
    add("--to", type=Path, required=True, help="the adapter's folder")
    add = command("import", "write a PEFT adapter as a prefix file")
    add("--prefix", type=Path, required=True, help="the adapter's folder")
    add("--to", type=Path, required=True, help="the prefix file, .safetensors")
    add("--model", help="the base model's folder or name (default: the one that the adapter names)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    {"show": show, "export": export, "import": import_adapter}[args.command](args)


def export(args: argparse.Namespace) -> None:
    """Write a prefix as the folder of a PEFT adapter."""
    path = find_trained(args.prefix)
    method = read_trained(path)[1].get("method", "prefix")
    if method != "prefix":
        raise InputError(f"{path} is of --method {method}: only a prefix can be a PEFT adapter")
    prefix = load_prefix(path)
    if prefix.info.get("format") == "peft":
        raise InputError(f"{args.prefix} is a PEFT adapter already: there is nothing to export")
    if set(prefix.kv) != {"decoder"}:
        sites = f"a prefix at {', '.join(prefix.kv)}"
        raise InputError(f"{args.prefix} is {sites}: PEFT has the decoder's only, train one with --sites decoder")
    kv, offset = prefix["decoder"], prefix.position_offset
    if offset != kv.size(3):
        what = f"its tokens start at position {offset}, PEFT's at the prefix length, {kv.size(3)}"
        raise InputError(f"{args.prefix} cannot be a PEFT adapter: {what} (train.py's default)")
    # Which kind of model it is for is in the file, as the model's sites.
    write_adapter(args.to, kv, '"encoder"' in prefix.info.get("base_shape", ""), prefix.info)
    print(f"wrote a PEFT adapter of {kv.size(3)} virtual tokens to {args.to}\n{PEFT_GENERATE}")


def import_adapter(args: argparse.Namespace) -> None:
    """Write a PEFT adapter as a prefix file."""
    if not (args.prefix / "adapter_config.json").is_file():
        raise InputError(f"{args.prefix} is no PEFT adapter: there is no adapter_config.json in it")
    folder = resolve_base_model(args.model, args.prefix, load_prefix(args.prefix).info)
    model = load_model(folder)
    prefix = load_prefix(args.prefix, model)
    info = {key: value for key, value in prefix.info.items() if key != "task_type"}  # PEFT's word for the kind of model
    save_prefix(args.to, prefix, model, {**info, "base_model": model_name(folder) or str(folder.resolve())})
    print(f"wrote a prefix of length {prefix.position_offset} to {args.to}")


# ---- show ----


def show(args: argparse.Namespace) -> None:
    """Print what a file of train.py, or a PEFT folder, holds; with --input also the attention to the prefix."""
    if args.plot:
        import_figure()  # if the package is missing, say so before the work
        if not args.input:
            raise InputError("--plot draws the attention on a text: give --input TEXT")
    path = find_trained(args.prefix)
    tensors, info = read_trained(path)
    method = info.get("method", "prefix")
    if method == "finetune":
        raise InputError(f"{path} is of --method finetune: a whole model, there is no prefix to show")
    if method in KINDS:
        tensors = load_prefix(path).kv  # checked
    describe(path, tensors, info)
    if method != "embedding" and not args.input:
        return
    if method not in (*KINDS, "embedding"):
        raise InputError(f"{path} is of --method {method}, there is no prefix to attend to: leave out --input")
    folder = resolve_base_model(args.model, args.prefix, info)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prefix = load_trained(path, model)
    if method == "embedding" and not model.encoder_decoder:
        print_nearest(tensors["embedding"], model, tokenizer)
    if args.input and prefix is not None:
        shares = print_attention(model, tokenizer, prefix, args.input)
        if args.plot:
            draw(shares, args.plot)


def describe(path: Path, tensors: dict[str, Tensor], info: dict[str, str]) -> None:
    """Print a file's metadata, the shapes and size of its tensors, and the norms of keys and values in each layer."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    metadata = {key: value for key, value in info.items() if key not in ("base_shape", "base_fingerprint")}
    size = f"{numbers:,} numbers, {4 * numbers / 2**20:.2f} MiB in float32"
    for key, value in {"file": str(path), **metadata, "saved": size}.items():
        print(f"{printable(key).replace('_', ' '):<17} {printable(value)[:200]}")
    if info.get("method", "prefix") not in KINDS:
        return
    sites = dict(sorted(tensors.items(), key=lambda item: item[0] == "cross"))  # cross-attention last
    for site, kv in sites.items():
        L, _, H, P, D = kv.shape
        print(f"{site:<17} length {P}, {L} layers, {H} heads of dimension {D}")
    print("\nnorm of a virtual token's keys and values, all heads together, mean over the tokens")
    print("layer" + "".join(f"{site + ' k':>12}{site + ' v':>12}" for site in sites))
    norms = [kv.float().square().sum(dim=(2, 4)).sqrt().mean(dim=2).tolist() for kv in sites.values()]  # (L, 2) each
    for layer, row in enumerate(zip_longest(*norms), 1):
        print(f"{layer:5}" + "".join(f"{pair[0]:12.3f}{pair[1]:12.3f}" if pair else " " * 24 for pair in row))


def printable(text: str) -> str:
    """A text on one line, control characters escaped, so that a file cannot control the terminal."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


@torch.inference_mode()
def print_nearest(embedding: Tensor, model: gpt2.GPT2, tokenizer: Tokenizer, count: int = 5) -> None:
    """Print the vocabulary tokens nearest to each virtual token (P, C), by cosine."""
    cosines = F.normalize(embedding.float(), dim=1) @ F.normalize(model.wte.weight.float(), dim=1).T
    print("\nnearest tokens of the vocabulary (cosine)")
    for i, (values, ids) in enumerate(zip(*cosines.topk(count), strict=True), 1):
        near = (f"{tokenizer.decode([id])!r} {value:.2f}" for value, id in zip(values, ids.tolist(), strict=True))
        print(f"{i:5}  {'  '.join(near)}")


def print_attention(model: Model, tokenizer: Tokenizer, prefix: KVPrefix, text: str) -> dict[str, Tensor]:
    """Generate a text for a source; print it and the share of attention that goes to the prefix -> the shares."""
    task, max_source = prefix.info.get("task", ""), trained_max_source(prefix.info)
    source = format_source(task, text)
    written = generate(model, tokenizer, [source], prefix, max_source=max_source, **recipe(task))[0]
    target = encode_target(written, tokenizer, model)
    batch = collate([(encode_sources([source], tokenizer, model, max_source, None)[0], [target])], tokenizer, model)
    shares = attention_shares(model, prefix, batch)
    print(f"\nsource            {printable(source)}\nwritten           {printable(written)}")
    for site, share in shares.items():
        tokens = "source" if site == "encoder" else "written text"
        print(f"\n{site}: % of the attention that goes to the prefix, mean over the {tokens}'s tokens")
        print("layer" + "".join(f"{head:5}" for head in range(1, share.size(1) + 1)) + "   mean  (heads)")
        for layer, row in enumerate(share.tolist(), 1):
            cells = "".join(f" {SHADES[min(int(5 * x), 4)]}{100 * x:3.0f}" for x in row)
            print(f"{layer:5}{cells}{100 * sum(row) / len(row):7.0f}")
    return shares


@torch.inference_mode()
def attention_shares(model: Model, prefix: KVPrefix, batch: Batch) -> dict[str, Tensor]:
    """The share of attention that goes to the prefix in a `Batch` of one row: site -> (L, H).

    Mean over the source's tokens at the site "encoder", else over the positions that write the target.
    """
    if isinstance(prefix, KVInfix):
        prefix = prefix.with_source_lengths(batch.source_lengths)
    shares: dict[str, list[Tensor]] = {site: [] for site in prefix.kv}
    handles = []

    def record(site: str, module: gpt2.Attention | bart.Attention, args: tuple[Any, ...]) -> None:
        q, kv, own_prefix = queries(module, *args)
        # Attention whose values are 1 at the prefix and 0 elsewhere.
        kv = kv._replace(v=torch.zeros_like(kv.v[..., :1]))
        share = attend(q, kv, own_prefix._replace(v=torch.ones_like(own_prefix.v[..., :1])))[0, :, :, 0]  # (H, T)
        shares[site].append((share if site == "encoder" else share[:, batch.target_positions]).mean(dim=1))

    for site, modules in attention_modules(model).items():
        for module in modules if site in prefix.kv else ():
            handles.append(module.register_forward_pre_hook(partial(record, site)))
    try:
        model.hidden_states(*batch.inputs, prefix=prefix)
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.stack(layers) for site, layers in shares.items()}


def attention_modules(model: Model) -> dict[str, list[Any]]:
    """Site -> the attention of each layer."""
    if not model.encoder_decoder:
        return {"decoder": [block.attn for block in model.h]}
    return {
        "encoder": [layer.self_attn for layer in model.encoder.layers],
        "decoder": [layer.self_attn for layer in model.decoder.layers],
        "cross": [layer.encoder_attn for layer in model.decoder.layers],
    }


def queries(module: gpt2.Attention | bart.Attention, x: Tensor, seen: Any, *others: Any) -> tuple[Tensor, KV, KV]:
    """From the arguments of a model's `Attention`: its queries (B, H, T, D), the keys and values, the prefix.

    seen: GPT-2's mask, or the KV that BART's attends to.
    """
    if isinstance(module, bart.Attention):
        return module.heads(module.q_proj(x)), seen, others[0]
    q, k, v = module.qkv(x)
    return q, KV(k, v, seen), others[0]


def draw(shares: dict[str, Tensor], path: Path) -> None:
    """The shares (L, H) of each site as a PNG."""
    figure = import_figure()(figsize=(4 * len(shares), 4), layout="constrained")
    axes = figure.subplots(1, len(shares), squeeze=False)
    for ax, (site, share) in zip(axes[0], shares.items(), strict=True):
        L, H = share.shape
        image = ax.imshow(share.numpy(), vmin=0, vmax=1, aspect="auto", extent=(0.5, H + 0.5, L + 0.5, 0.5))
        ax.set(title=site, xlabel="head", ylabel="layer")
    figure.colorbar(image, ax=axes, label="share of attention on the prefix")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)
    print(f"\nwrote {path}")


def import_figure() -> Any:
    """Matplotlib's Figure: a class."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install -e '.[plot]'") from error
    return Figure
