"""A tiny random GPT-2 folder with the bundled tokeniser, for tests that need a whole model but not a good one."""

import json
import shutil
from pathlib import Path

import torch

from minprefix.checkpoint import write_safetensors
from minprefix.gpt2 import GPT2, to_huggingface

ROOT = Path(__file__).parent.parent


def write_tiny_model(folder, seed=0, vocab_size=4096):
    """2 layers, width 32, 4 heads, 256 positions, the bundled tokeniser."""
    torch.manual_seed(seed)
    model = GPT2({"vocab_size": vocab_size, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    write_safetensors(folder / "model.safetensors", to_huggingface(model))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(ROOT / "weights" / "gpt2-mini" / name, folder / name)
    return folder
