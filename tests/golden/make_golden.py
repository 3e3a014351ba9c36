"""Write tiny-gpt2/ and tiny-gpt2-logits.safetensors: a random GPT-2, and what transformers computes with it.

    python tests/golden/make_golden.py      (needs transformers; the committed files are of version 5.23, float64)
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent
SHAPE = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_inner": 40, "vocab_size": 37, "n_positions": 24,
         "bos_token_id": 36, "eos_token_id": 36}  # fmt: skip
L, H, D, B, T, P = 2, 2, 8, 2, 6, 3


def random_state(model):
    """Every tensor random, biases and norms too: nothing that is left out may go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.4 + (name.endswith("weight") and p.dim() == 1)
        for name, p in model.named_parameters()
    }


@torch.no_grad()
def logits(model, ids, prefix=None):
    """prefix (L, 2, B, H, P, D); transformers gives the first token position P by itself."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate([] if prefix is None else prefix):
        cache.update(k, v, layer)
    return model(ids, past_key_values=cache).logits


def main():
    model = GPT2LMHeadModel(GPT2Config(**SHAPE))
    state = random_state(model)
    model.load_state_dict(state, strict=False)  # lm_head.weight is tied to wte
    model.save_pretrained(HERE / "tiny-gpt2")
    (HERE / "tiny-gpt2" / "generation_config.json").unlink()

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(37, (B, T), generator=generator)
    shared = torch.randn(L, 2, H, P, D, generator=generator, dtype=torch.float64)
    rows = torch.randn(L, 2, B, H, P, D, generator=generator, dtype=torch.float64)
    golden = {"ids": ids, "shared": shared, "rows": rows}
    for activation in ("gelu_new", "gelu", "relu"):
        config = GPT2Config(**SHAPE, activation_function=activation)
        model = GPT2LMHeadModel(config).double().eval()
        model.load_state_dict(state, strict=False)
        golden[f"{activation}.none"] = logits(model, ids)
        golden[f"{activation}.shared"] = logits(model, ids, shared.unsqueeze(2).expand_as(rows))
        golden[f"{activation}.rows"] = logits(model, ids, rows)
    save_file(golden, HERE / "tiny-gpt2-logits.safetensors")


if __name__ == "__main__":
    main()
