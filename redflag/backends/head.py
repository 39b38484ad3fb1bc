"""The output head, applied only where needed: hidden states in, logits of some positions out.

With V = 151,936, float32 logits take 0.6 MB per token. Scoring needs K numbers per token, so the backbone runs once and
the head runs over the positions that are scored, a few at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging import version

from redflag.backends.choose import measure

# transformers' name for the key-value cache; since 5.24 the old name warns, and 5.40 will not accept it.
CACHE = "cache" if version.parse(transformers.__version__).release >= (5, 24) else "past_key_values"
# Logits in memory at one time while scoring, in elements: 64 MB of float32.
_LOGITS_AT_ONCE = 16_777_216


def plain_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (its adapters stay in force); any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: Any) -> Any:
    """The part of a causal language model that turns ids into last hidden states."""
    return plain_model(model).get_decoder()


def logit_finish(model: Any) -> tuple[float, float | None]:
    """A model's changes to its logits after the matrix: a factor, then a soft cap (None = no cap).

    Cohere, Granite, Falcon-H1, MiniCPM and others multiply or divide by a number of their configuration; Gemma caps
    with `cap * tanh(logits / cap)` (section 2 of the Gemma 2 report). `head_agrees` detects families that do something
    else.
    """
    config = plain_model(model).config.get_text_config()
    factor, cap = 1.0, None
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        value = getattr(config, name, None)
        factor *= value if isinstance(value, (int, float)) else 1.0
    scaling = getattr(config, "logits_scaling", None)
    if isinstance(scaling, (int, float)):
        # The same configuration key is a factor in some families and a divisor in others.
        factor = factor * scaling if config.model_type.startswith("hyperclovax") else factor / scaling
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        cap = getattr(config, name, None) or cap
    return factor, cap


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of last hidden states, as the model's own forward computes them.

    Args:
        hidden: Last hidden states, shape `(N, H)`, in the model's dtype.

    Returns:
        Logits in the model's dtype, shape `(N, V)`.
    """
    factor, cap = logit_finish(model)
    logits = plain_model(model).get_output_embeddings()(hidden)
    if factor != 1.0:
        logits = logits * factor
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.inference_mode()
def head_agrees(model: Any, token_ids: torch.Tensor) -> bool:
    """Whether backbone and head, applied separately, give the logits of the whole model.

    Args:
        token_ids: A few arbitrary ids, shape `(1, T)`, on the model's device.
    """
    try:
        hidden = backbone(model)(input_ids=token_ids, use_cache=False).last_hidden_state[0]
        apart = head_logits(model, hidden).float()
    except (AttributeError, TypeError, RuntimeError):
        return False
    whole = model(input_ids=token_ids, use_cache=False).logits[0].float()
    if apart.shape != whole.shape:
        return False
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
    scale = max(1.0, float(whole.abs().max()))
    return bool((apart - whole).abs().max() <= tolerance * scale)


@torch.inference_mode()
def measure_hidden(model: Any, hidden: torch.Tensor, flag_ids: torch.Tensor) -> torch.Tensor:
    """Flag probabilities from hidden states, without ever holding the logits of all positions.

    Args:
        hidden: Last hidden states of N positions, shape `(N, H)`.
        flag_ids: The K flag ids, int64, on the same device.

    Returns:
        Probabilities, float32, shape `(N, K)`.
    """
    at_once = max(1, _LOGITS_AT_ONCE // plain_model(model).get_output_embeddings().weight.shape[0])
    parts = [measure(head_logits(model, chunk).float(), flag_ids) for chunk in hidden.split(at_once)]
    return torch.cat(parts) if parts else hidden.new_zeros((0, len(flag_ids)), dtype=torch.float32)
