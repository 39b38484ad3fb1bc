"""The model's last hidden states, and a check that applying its head to them separately is exact."""

from __future__ import annotations

from typing import Any

import torch

from redflag.backends.head import backbone, plain_model
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.training.adapter import output_head


def unwrapped(model: Any) -> Any:
    """The model inside DDP and similar wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def last_hidden(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden states (B, T, H), captured during the model's forward, which applies its own head to one position."""
    caught: list[torch.Tensor] = []
    hook = backbone(unwrapped(model)).register_forward_hook(lambda _module, _args, output: caught.append(output[0]))
    try:
        extra = {} if position_ids is None else {"position_ids": position_ids}
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1, **extra)
    finally:
        hook.remove()
    return caught[0]


def check_head(model: Any, spec: FlagSpec) -> None:
    """Refuses a model whose logits differ from its head applied to the hidden states, before hours of training."""
    plain = plain_model(model)
    device = next(plain.parameters()).device
    ids = torch.arange(1, 5, device=device)[None]
    training = plain.training
    plain.eval()
    with torch.no_grad():
        expected = plain(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0].float()
        hidden = last_hidden(model, ids, torch.ones_like(ids))[0, -1:]
        got = output_head(model, spec).logits(hidden, torch.tensor(spec.ids, device=device))
    plain.train(training)
    width = min(expected.shape[1], got.shape[1])
    if not torch.allclose(expected[:, :width], got[:, :width], rtol=2e-2, atol=2e-2):
        raise RedflagError(
            f"{type(plain).__name__} is not supported: it changes its logits in a way unknown to redflag (they differ "
            f"by {(expected[:, :width] - got[:, :width]).abs().max().item():.3g}), so the loss would be wrong. Please "
            "report the architecture."
        )
