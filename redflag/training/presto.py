"""PRESTO: a refusal should not attend to the harmful prefill that it follows (Vega and Singh, arXiv 2512.05518).

For every layer, head and query position it penalises the attention on the prefill minus the attention elsewhere. As the
weights of a query sum to 1, that is 2 x the attention on the prefill - 1.

Shapes: B rows, h heads, T columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from redflag.backends.head import backbone
from redflag.errors import RedflagError
from redflag.training.hidden_states import unwrapped


def presto_loss(
    attentions: Sequence[torch.Tensor],
    start_B: torch.Tensor,
    prefill_B: torch.Tensor,
    end_B: torch.Tensor,
    queries: str,
) -> torch.Tensor:
    """Sum over rows, queries and heads of attention on the prefill minus attention elsewhere; mean over layers.

    Args:
        attentions: Attention weights of each layer, (B, h, T, T): query, key.
        start_B: Column of the first prefill token.
        prefill_B: Tokens of the prefill; rows without one (0 or less) contribute nothing.
        end_B: Column after the last token of the refusal.
        queries: `answer`: from the first prefill token to the end of the refusal, plus 1 for each query and head, so
            that the minimum is 0 (as in the released code). `all`: every position, nothing added (as in the formula).
            Positions before the prefill cannot attend to it, so the two differ by a constant only, except for models
            whose attention weights do not sum to 1.
    """
    width = attentions[0].shape[-1]
    column = torch.arange(width, device=start_B.device)
    start, end = start_B[:, None], end_B[:, None]
    prefill = (column >= start) & (column < start + prefill_B[:, None])
    is_query = (column < end) & (prefill_B[:, None] > 0)
    if queries == "answer":
        is_query &= column >= start
    total = attentions[0].new_zeros((), dtype=torch.float32)
    for weights in attentions:
        on_prefill = (weights.float() * prefill[:, None, None, :]).sum(-1)  # B, h, T
        elsewhere = (weights.float() * (column < end)[:, None, None, :]).sum(-1) - on_prefill
        value = on_prefill - elsewhere + (1.0 if queries == "answer" else 0.0)
        total = total + (value * is_query[:, None, :]).sum()
    return total / len(attentions)


def attention_modules(model: Any) -> list[torch.nn.Module]:
    """The attention of each layer; layers of another kind (state spaces) have none."""
    return [m for m in backbone(model).modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]


@contextmanager
def watched_attention(model: Any, wanted: bool) -> Iterator[list[torch.Tensor]]:
    """Collects each layer's attention weights while the model runs; the list stays empty if not `wanted`.

    Raises:
        RedflagError: The model does not return its attention weights.
    """
    caught: list[torch.Tensor] = []
    if not wanted:
        yield caught
        return

    def catch(module: torch.nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) < 2 or output[1] is None:
            raise RedflagError(
                f"presto_coef must be 0 for a model that returns no attention weights (got {type(module).__name__}). "
                "Load it with eager attention (redflag train --attention eager)."
            )
        caught.append(output[1])

    hooks = [module.register_forward_hook(catch) for module in attention_modules(unwrapped(model))]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def check_eager(model: Any) -> None:
    """Refuses a model that returns no attention weights, before training instead of in its first step.

    Raises:
        RedflagError: The attention is not eager, or nothing in the model is attention.
    """
    implementation = getattr(model.config.get_text_config(), "_attn_implementation", None)
    if implementation != "eager":
        raise RedflagError(
            f"attention must be eager for presto_coef (got {implementation!r}). Other implementations return no "
            "attention weights. Add --attention eager, which takes more memory, or leave presto_coef at 0."
        )
    if not attention_modules(model):
        raise RedflagError(
            f"presto_coef must be 0 for {type(model).__name__}, in which redflag finds no attention layer."
        )
