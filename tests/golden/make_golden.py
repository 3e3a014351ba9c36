"""Write tiny-gpt2/, tiny-bart/ and their -logits.safetensors: random models, and what transformers computes with them.

python tests/golden/make_golden.py      (needs transformers; the committed files are of version 5.23, float64)
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
)

HERE = Path(__file__).parent
SHAPE = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_inner": 40, "vocab_size": 37, "n_positions": 24,
         "bos_token_id": 36, "eos_token_id": 36}  # fmt: skip
L, H, D, B, T, P = 2, 2, 8, 2, 6, 3

BART_SHAPE = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
              "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20, "vocab_size": 37,
              "max_position_embeddings": 24}  # fmt: skip
BART_VARIANTS = {"gelu": {}, "gelu_new": {"activation_function": "gelu_new"}, "relu": {"activation_function": "relu"},
                 "scaled": {"scale_embedding": True}, "untied": {"tie_word_embeddings": False}}  # fmt: skip
LENGTHS = torch.tensor([6, 3])  # of the two sources


def random_state(model):
    """Every tensor random, biases and norms too: nothing that is left out may go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.4 + (name.endswith("weight") and p.dim() == 1)
        for name, p in [*model.named_parameters(), *model.named_buffers()]
    }


def past(prefix):
    """prefix None or (L, 2, B, H, P, D); transformers gives the first token position P by itself."""
    cache = DynamicCache()
    for layer, (k, v) in enumerate([] if prefix is None else prefix):
        cache.update(k, v, layer)
    return cache


@torch.no_grad()
def logits(model, ids, prefix=None):
    return model(ids, past_key_values=past(prefix)).logits


@torch.no_grad()
def bart_logits(model, source, target, prefix=None):
    """source (B, S), padded after LENGTHS; prefix: that of the decoder's self-attention."""
    mask = (torch.arange(source.size(1)) < LENGTHS[:, None]).long()
    cache = EncoderDecoderCache(past(prefix), DynamicCache())
    return model(source, attention_mask=mask, decoder_input_ids=target, past_key_values=cache).logits


def untied(state):
    """Of the one embedding three others, their rows moved by 1, 2 and 3."""
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    return {**state, **{name: state["model.shared.weight"].roll(n + 1, dims=0) for n, name in enumerate(copies)}}


def main():
    gpt2()
    bart()


def gpt2():
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


def bart():
    model = BartForConditionalGeneration(BartConfig(**BART_SHAPE))
    state = random_state(model)
    model.load_state_dict(state, strict=False)  # the other embeddings are tied to `shared`
    model.save_pretrained(HERE / "tiny-bart")
    (HERE / "tiny-bart" / "generation_config.json").unlink()

    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(37, (2, n), generator=generator) for n in (6, 4))
    shared = torch.randn(2, 2, 4, 3, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, 2, 2, 4, 3, 4, generator=generator, dtype=torch.float64)
    golden = {"source": source, "target": target, "lengths": LENGTHS, "shared": shared, "rows": rows}
    for name, variant in BART_VARIANTS.items():
        model = BartForConditionalGeneration(BartConfig(**BART_SHAPE, **variant)).double().eval()
        model.load_state_dict(untied(state) if name == "untied" else state, strict=False)
        golden[f"{name}.rows"] = bart_logits(model, source, target, rows)
        if name == "gelu":
            golden["gelu.none"] = bart_logits(model, source, target)
            golden["gelu.shared"] = bart_logits(model, source, target, shared.unsqueeze(2).expand_as(rows))
    save_file(golden, HERE / "tiny-bart-logits.safetensors")


if __name__ == "__main__":
    main()
