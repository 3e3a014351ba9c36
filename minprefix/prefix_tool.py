"""What a prefix file is, and PEFT's format in and out: the command `python -m minprefix.prefix`.

    python -m minprefix.prefix show runs/mine/prefix.safetensors --input "name[Blue Spice], food[Thai]"
    python -m minprefix.prefix export --prefix runs/mine/prefix.safetensors --to adapter/
    python -m minprefix.prefix import --prefix adapter/ --to prefix.safetensors --model gpt2-medium
"""

import argparse
from pathlib import Path

from minprefix.files import InputError, run_main
from minprefix.hub import model_name, resolve_model
from minprefix.load import load_model
from minprefix.peft_format import write_adapter
from minprefix.prefix import check_fits, load_prefix, save_prefix


def parse_args():
    parser = argparse.ArgumentParser(
        prog="python -m minprefix.prefix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("export", help="write a prefix as a PEFT adapter").add_argument
    add("--prefix", type=Path, required=True, help="a prefix file, or the folder of the run that trained it")
    add("--to", type=Path, required=True, help="the adapter's folder")
    add = commands.add_parser("import", help="write a PEFT adapter as a prefix file").add_argument
    add("--prefix", type=Path, required=True, help="the adapter's folder")
    add("--to", type=Path, required=True, help="the prefix file, .safetensors")
    add("--model", help="the base model's folder or name (default: the one that the adapter names)")
    return parser.parse_args()


def main():
    args = parse_args()
    {"export": export, "import": import_adapter}[args.command](args)


def export(args):
    """Write a prefix as the folder of a PEFT adapter."""
    prefix = load_prefix(args.prefix)
    if set(prefix) != {"decoder"}:
        sites = f"a prefix at {', '.join(prefix)}"
        raise InputError(f"{args.prefix} is {sites}: PEFT has the decoder's only, train one with --sites decoder")
    kv, offset = prefix["decoder"], prefix.position_offset
    if offset != kv.size(3):
        what = f"its tokens start at position {offset}, PEFT's at the prefix length, {kv.size(3)}"
        raise InputError(f"{args.prefix} cannot be a PEFT adapter: {what} (train.py's default)")
    # Which kind of model it is for is in the file, as the model's sites.
    write_adapter(args.to, kv, '"encoder"' in prefix.info.get("base_shape", ""), prefix.info)
    print(f"wrote a PEFT adapter of {kv.size(3)} virtual tokens to {args.to}")


def import_adapter(args):
    """Write a PEFT adapter as a prefix file."""
    if not (args.prefix / "adapter_config.json").is_file():
        raise InputError(f"{args.prefix} is no PEFT adapter: there is no adapter_config.json in it")
    prefix = load_prefix(args.prefix)
    folder = base_folder(prefix, args)
    model = load_model(folder)
    check_fits(prefix, model, args.prefix)
    save_prefix(args.to, prefix, model, {**prefix.info, "base_model": model_name(folder) or str(folder.resolve())})
    print(f"wrote a prefix of length {prefix.position_offset} to {args.to}")


def base_folder(prefix, args):
    """The folder of the model that the command line or else the prefix names."""
    name = args.model or prefix.info.get("base_model")
    if not name:
        raise InputError(f"{args.prefix} does not name its base model: give --model")
    return resolve_model(name)


if __name__ == "__main__":
    run_main(main)
