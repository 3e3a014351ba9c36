"""The inputs of sample.py (rows, lines or arguments) and the texts that it writes for them."""

import json
import sys
from argparse import Namespace
from typing import Any

from minprefix.cli.requests import prefix_name
from minprefix.core.encode import Example
from minprefix.data.rows import group_rows, read_lines
from minprefix.data.tasks import ROW_SUFFIXES, format_source, load_on_topics
from minprefix.system import distributed
from minprefix.system.errors import InputError
from minprefix.system.files import atomic_write


def read_examples(args: Namespace, trained_task: str) -> list[Example]:
    """The inputs that the command line names, at most --limit, in the form that the prefix was trained on."""
    rows = args.task or args.file or ""
    if args.task or rows.endswith(ROW_SUFFIXES):
        return read_rows(args, rows, trained_task)[: args.limit]
    return read_texts(args, trained_task)[: args.limit]


def read_rows(args: Namespace, rows: str, trained_task: str) -> list[Example]:
    """The Examples of a task, or of a user's file. Where they are scored, rows with the same source are one."""
    examples = load_on_topics(rows, args.split, args.data, args.topics, args.topic_field if args.task else "prefix")
    if not rows.endswith(ROW_SUFFIXES):
        return examples
    name = prefix_name(args.prefix) if args.file and args.prefix else None
    if others := [e.topic for e in examples if name and e.topic not in (None, name)]:
        raise InputError(f'{rows}: a row has "prefix": {others[0]!r:.80}: give that --prefix, too')
    for number, example in enumerate(examples, 1):
        example.source = format_source(trained_task, example.source, f"{rows}, row {number}")
    return group_rows(examples, rows) if args.evaluate else examples


def read_texts(args: Namespace, trained_task: str) -> list[Example]:
    """An Example without references for each --input, or each line of --file or of stdin that is not blank."""
    where = "--input" if args.input else "stdin" if args.file is None else args.file
    if where == "stdin" and distributed.world_size() > 1:
        raise InputError("stdin is one process's to read: give the inputs by --file")
    if where == "stdin" and sys.stdin.isatty():
        print("type inputs, one a line, then Ctrl-D", file=sys.stderr)
    lines = args.input or read_lines("-" if args.file is None else args.file)
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError(f"{where} holds no input: give --input TEXT, --file FILE, --task, or lines on stdin")
    if len(numbered) < len(lines):
        print(f"skipped {len(lines) - len(numbered)} blank inputs", file=sys.stderr)
    return [Example(format_source(trained_task, line, f"{where}, number {number}"), []) for number, line in numbered]


def write_texts(sources: list[str], found: list[list[tuple[str, float]]], args: Namespace) -> list[str]:
    """Print what was found for the sources, or write it to --output -> the best texts as lines.

    One text a line, a single text on a terminal as it is; with --return or --scores JSONL rows.
    """
    best = [texts[0][0] for texts in found]
    lines = [" ".join(text.splitlines()) for text in best]  # at all line ends of Unicode
    if distributed.rank() > 0:
        return lines
    output = lines if args.output or len(best) > 1 else best
    if args.returned or args.scores:
        escape = not args.output and sys.stdout.encoding.lower() != "utf-8"
        output = []
        for source, texts in zip(sources, found, strict=True):
            row: dict[str, Any] = {"source": source, "texts": [text for text, _ in texts]}
            if args.scores:
                row["scores"] = [score for _, score in texts]
            output.append(json.dumps(row, ensure_ascii=escape))
    if args.output:
        with atomic_write(args.output) as file:
            file.writelines(line + "\n" for line in output)
        print(f"wrote {len(lines)} texts to {args.output}", file=sys.stderr)
    else:
        print(*output, sep="\n")
    return lines
