"""The keys of energy-based fine-tuning."""

from __future__ import annotations

from typing import Any

from ..base import UnreadKeys, unread

EBFT = "only energy-based fine-tuning (rl: ebft) reads it"
_KEY = unread("not applicable", EBFT)


class EbftKeys(UnreadKeys):
    """``ebft``: settings for energy-based fine-tuning."""

    adaptive_max_tokens: Any = _KEY
    advantage_estimator: Any = _KEY
    alignment_coef: Any = _KEY
    ce_coef: Any = _KEY
    context_length: Any = _KEY
    diversity_coef: Any = _KEY
    embed_method: Any = _KEY
    feature_layers: Any = _KEY
    generate_max_len: Any = _KEY
    gt_length_multiplier: Any = _KEY
    min_completion_prefix: Any = _KEY
    mode: Any = _KEY
    n_samples_per_prompt: Any = _KEY
    rl_coef: Any = _KEY
    stride: Any = _KEY
    temperature: Any = _KEY
    top_p: Any = _KEY
    use_whitening: Any = _KEY
