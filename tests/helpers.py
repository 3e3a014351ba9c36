"""What several tests share: a script called as from the shell, its complaints, WebNLG's XML, GPT-2 in NumPy."""

import sys

import numpy as np
import pytest

from minprefix.system.errors import InputError, run_main
from tests.tiny import ROOT

ROWS = [{"source": f"item {i} of the list", "target": f"This is item number {i}."} for i in range(40)]
E2E = ROOT.parent / "shared" / "data" / "e2e"
needs_e2e = pytest.mark.skipif(not E2E.is_dir(), reason="the E2E files are not at ../shared/data/e2e")
MR = "name[The Golden Lantern], eatType[pub], food[Thai]"


def call(script, capsys, *args):
    """Run a script's main with arguments -> (exit code, stdout, stderr)."""
    sys.argv = [script.__name__ + ".py", *map(str, args)]
    code = 0
    try:
        run_main(script.main)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_clear_line(script, arguments, message, capsys, world):
    """One line that holds the message, but for those on sources that were cut; exit code 2; nothing half-written."""
    code, out, err = call(script, capsys, *(arguments.split() if isinstance(arguments, str) else arguments))
    lines = [line for line in err.splitlines() if not line.startswith("cut ")]
    assert code == 2, (out, err)
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert not list(world.rglob("*.tmp"))


def failing_compile(error):
    """In the place of torch.compile: what it compiles raises the error when it is called."""

    def fail(*args):
        raise error

    return lambda function, dynamic: fail


def singles(pairs):
    """(source, target) pairs as groups of one target each, of which `collate` makes a row each."""
    return [(source, [target]) for source, target in pairs]


def pairs_of(groups):
    """The (source, target) pairs of groups, in order."""
    return [(source, target) for source, targets in groups for target in targets]


def complaint(function, *arguments):
    """The message of the InputError that a call raises: one line, not too long."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


def entry(category, *triples, good=(), bad=()):
    parts = ["<originaltripleset><otriple>no | no | no</otriple></originaltripleset><modifiedtripleset>"]
    parts += [f"<mtriple>{triple}</mtriple>" for triple in triples] + ["</modifiedtripleset>"]
    parts += [f'<lex comment="good" lid="Id1">{text}</lex>' for text in good]
    parts += [f'<lex comment="toFix" lid="Id1">{text}</lex>' for text in bad]
    return f'<entry category="{category}" eid="Id1" size="{len(triples)}">{"".join(parts)}</entry>'


def write_xml(path, *entries, head='<?xml version="1.0" encoding="UTF-8"?>\n'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}<benchmark>\n<entries>\n{''.join(entries)}</entries>\n</benchmark>\n", encoding="utf-8")
    return path


def numpy_logits(model, x, start=0, infix=None):
    """GPT-2's logits in NumPy, token by token, in float64: x (T, C) -> (T, V).

    x: embeddings with their positions'. infix (L, 2, H, P, D): seen by the tokens from number `start` on.
    """
    w = {name: p.double().numpy() for name, p in model.state_dict().items()}
    heads = model.h[0].attn.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + model.config["layer_norm_epsilon"])
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for layer in range(len(model.h)):
        at = f"h.{layer}"
        q, k, v = np.split(linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn"), 3, axis=-1)
        q, k, v = (part.reshape(len(x), heads, -1) for part in (q, k, v))
        y = np.zeros_like(q)
        for t in range(len(x)):
            for head in range(heads):
                keys, values = k[: t + 1, head], v[: t + 1, head]
                if infix is not None and t >= start:
                    keys = np.concatenate([infix[layer, 0, head], keys])
                    values = np.concatenate([infix[layer, 1, head], values])
                scores = np.exp(keys @ q[t, head] / np.sqrt(q.shape[-1]))
                y[t, head] = scores / scores.sum() @ values
        x = x + linear(y.reshape(len(x), -1), f"{at}.attn.c_proj")
        h = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"{at}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def numpy_inputs(model, ids, positions):
    return (model.wte.weight[ids] + model.wpe.weight[positions]).double().numpy()


def reference_infix(model, source, target, kv):
    """Logits of [x; INFIX; y] -> (S + N, V): the target's positions come after the infix's."""
    P = kv.shape[-2]
    positions = [*range(len(source)), *range(len(source) + P, len(source) + P + len(target))]
    return numpy_logits(model, numpy_inputs(model, [*source, *target], positions), len(source), kv.numpy())
