"""Continuous adversarial training: the flag is learnt on prompts whose embeddings were perturbed to suppress it.

As in Xhonneux et al. (arXiv 2405.15589), whose settings are the defaults of `RedFlagConfig`: signed gradient steps from
the original prompt, with each token's shift projected onto an l2 ball.

Shapes: B rows, T columns, H embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from redflag.backends.head import plain_model
from redflag.training.hidden_states import unwrapped


def worst_shift(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    where_BT: torch.Tensor,
    width: int,
    steps: int,
    size: float,
    radius: float,
) -> torch.Tensor:
    """Finds a shift of the embeddings that raises a loss, by signed gradient ascent.

    Args:
        loss_of: Shift (B, T, H) -> the scalar to maximise.
        where_BT: Positions that may be shifted.
        width: H.
        size: Step size in each coordinate.
        radius: Largest l2 norm of one token's shift.

    Returns:
        The shift, without gradient; 0 where nothing may be shifted.
    """
    shift = torch.zeros((*where_BT.shape, width), device=where_BT.device)
    with torch.enable_grad():
        for _ in range(steps):
            shift.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss_of(shift), shift)
            shift = (shift + size * gradient.sign()).detach() * where_BT[..., None]
            norm = shift.norm(dim=-1, keepdim=True)
            shift = shift * (radius / norm.clamp(min=1e-30)).clamp(max=1.0)
    return shift.detach()


@contextmanager
def shifted(model: Any, shift: torch.Tensor) -> Iterator[None]:
    """Adds `shift` to the model's input embeddings within the context; the model is called as usual."""
    embedding = plain_model(unwrapped(model)).get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _module, _args, output: output + shift.to(output.dtype))
    try:
        yield
    finally:
        hook.remove()
