"""BLEU, NIST, ROUGE-L, CIDEr, METEOR, TER and ROUGE of texts against references: lists of texts in, numbers out."""

from minprefix.metrics.scores import (
    bleu,
    bootstrap,
    cider,
    common_subsequence_length,
    meteor,
    mteval_tokens,
    nist,
    rouge,
    rouge_l,
    rouge_scorer,
    score,
    summary_score,
    ter,
)

__all__ = [
    "bleu", "bootstrap", "cider", "common_subsequence_length", "meteor", "mteval_tokens", "nist", "rouge", "rouge_l",
    "rouge_scorer", "score", "summary_score", "ter",
]  # fmt: skip
