"""Log-probabilities at some positions, with gradients, without ever holding N x V logits.

The loss itself has a closed-form gradient; the optional terms use these functions. The head is applied to a few
positions at a time, and again in the backward pass instead of storing the logits.

Shapes: N positions, H hidden, K flags.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from redflag.training.loss import Head


def class_log_probs(hidden_NH: torch.Tensor, head: Head, flag_ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the classes none, flag 1, ..., flag K at N positions, (N, K + 1), nats."""

    def read(part: torch.Tensor) -> torch.Tensor:
        z = head.logits(part, flag_ids)
        none = z.index_fill(1, flag_ids, -torch.inf).logsumexp(-1)
        return torch.cat([none[:, None], z[:, flag_ids]], 1).log_softmax(-1)

    empty = hidden_NH.new_zeros((0, len(flag_ids) + 1), dtype=torch.float32)
    return _in_parts(read, [hidden_NH], empty, head)


def token_log_probs(
    hidden_NH: torch.Tensor, head: Head, flag_ids: torch.Tensor, tokens_N: torch.Tensor
) -> torch.Tensor:
    """Log-probability of one token at each of N positions under the language distribution (flags left out), nats."""

    def read(part: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        z = head.logits(part, flag_ids).index_fill(1, flag_ids, -torch.inf)
        return z.gather(1, tokens[:, None])[:, 0] - z.logsumexp(-1)

    return _in_parts(read, [hidden_NH, tokens_N], hidden_NH.new_zeros(0, dtype=torch.float32), head)


def _in_parts(
    read: Callable[..., torch.Tensor], inputs: list[torch.Tensor], empty: torch.Tensor, head: Head
) -> torch.Tensor:
    chunks = [empty]
    for parts in zip(*(tensor.split(head.positions_at_once) for tensor in inputs), strict=True):
        if len(parts[0]) == 0:
            continue
        if torch.is_grad_enabled():
            chunks.append(checkpoint(read, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            chunks.append(read(*parts))
    return torch.cat(chunks)
