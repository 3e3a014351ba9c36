"""minprefix: GPT-2 and BART with prefix-tuning (Li & Liang 2021), from scratch in PyTorch."""

import warnings

from minprefix import metrics
from minprefix.generate import generate
from minprefix.load import load_model
from minprefix.prefix import Prefix, load_prefix, stack_prefixes
from minprefix.tokenizer import load_tokenizer

__all__ = ["Prefix", "generate", "load_model", "load_prefix", "load_tokenizer", "metrics", "stack_prefixes"]

# Python warns of `python -m minprefix.prefix`, since that module has just been imported here; it does no harm.
warnings.filterwarnings("ignore", "'minprefix.prefix' found in sys.modules")
