"""Tiny random GPT-2 and BART folders with the bundled tokeniser, for tests that need a whole model, not a good one."""

import json
import shutil
from pathlib import Path

import torch

from minprefix.core import bart
from minprefix.core.gpt2 import GPT2
from minprefix.formats.names import to_huggingface
from minprefix.formats.safetensors import write_safetensors

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


def write_tiny_bart(folder, seed=0, vocab_size=4100, **config):
    """2 + 1 layers, width 32, 4 + 2 heads, 256 positions; the bundled tokeniser with BART's special tokens around."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 48}  # fmt: skip
    model = bart.BART({"vocab_size": vocab_size, "max_position_embeddings": 256, **sizes, **config})
    for tensor in [*model.parameters(), model.final_logits_bias]:
        torch.nn.init.normal_(tensor, std=0.1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    write_safetensors(folder / "model.safetensors", to_huggingface(model))
    bundled = ROOT / "weights" / "gpt2-mini"
    bpe = [token for token in json.loads((bundled / "vocab.json").read_text("utf-8")) if token != "<|endoftext|>"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *bpe, "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    shutil.copy(bundled / "merges.txt", folder / "merges.txt")
    return folder
