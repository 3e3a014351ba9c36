"""minprefix: GPT-2 and BART with prefix-tuning (Li & Liang 2021), from scratch in PyTorch."""

from minprefix import metrics
from minprefix.core.generate import generate, generate_scored
from minprefix.core.prefix import Prefix, stack_prefixes
from minprefix.formats.load import load_model
from minprefix.formats.prefix_file import load_prefix
from minprefix.formats.tokenizer import load_tokenizer

__all__ = [
    "Prefix",
    "generate",
    "generate_scored",
    "load_model",
    "load_prefix",
    "load_tokenizer",
    "metrics",
    "stack_prefixes",
]
