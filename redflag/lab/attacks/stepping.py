"""Next-token logits of a text that grows and shrinks, for attacks that choose every token themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from redflag.backends.choose import measure
from redflag.backends.head import CACHE, plain_model
from redflag.errors import RedflagError
from redflag.lab.attacks import Target
from redflag.weights.prefix import PrefixSlot


class Look(NamedTuple):
    """What an attacker is shown at one position."""

    candidates: tuple[int, ...]  # the k most likely next tokens, most likely first, flags left out
    flag_probs: tuple[float, ...]  # K flag probabilities, measured over the whole vocabulary before any token is chosen


def weights_of(target: Target, attack: str) -> Any:
    """The target's model, in evaluation mode."""
    if target.model is None:
        raise RedflagError(
            f"{attack} needs the target's weights: load the model with `redflag.backends.load.load_flagged` and pass "
            "it as Target(model=...), or leave this attack out."
        )
    return target.model.eval()


def room_for(target: Target, prompt_ids: Sequence[int], wanted: int) -> int:
    """How many of the wanted tokens fit the context after the prompt."""
    limit = getattr(target.backend, "context_length", None)
    return wanted if limit is None else max(0, min(wanted, limit - len(prompt_ids)))


class Stepper:
    """Runs a model over texts that have a long beginning in common: one forward pass over what is new.

    Going back by some tokens cuts the key-value cache; caches that cannot be cut (sliding windows, recurrent layers)
    are rebuilt. Logits agree with those of a fresh run up to rounding.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = plain_model(model).device
        self._config = plain_model(model).config.get_text_config()
        self._slot = PrefixSlot()
        self.passes = 0

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Raw logits of the token after `token_ids` (at least one), float32, shape `(V,)`."""
        ids = list(token_ids)
        taken = self._slot.take(ids)
        cache, held = taken if taken is not None else (DynamicCache(config=self._config), 0)
        inputs = torch.tensor([ids[held:]], device=self._device)
        output = self._model(input_ids=inputs, use_cache=True, **{CACHE: cache})
        self._slot.put(cache, ids)
        self.passes += 1
        return output.logits[0, -1].float()


class Looker:
    """Shows a rank-assisted attacker the candidates at a position."""

    def __init__(self, target: Target, attack: str, k: int) -> None:
        self._stepper = Stepper(weights_of(target, attack))
        self._device = plain_model(target.model).device
        self._flag_ids = torch.tensor(target.spec.ids, dtype=torch.long, device=self._device)
        self._k = k

    def __call__(self, token_ids: Sequence[int]) -> Look:
        """The candidates and flags after `token_ids`."""
        return look_at(self._stepper.logits(token_ids), self._flag_ids, self._k)


def look_at(logits: torch.Tensor, flag_ids: torch.Tensor, k: int) -> Look:
    """Measures the flags, then takes them out and ranks the rest."""
    probs = measure(logits[None], flag_ids)[0]
    ranked = logits.index_fill(0, flag_ids, -torch.inf).topk(min(k, logits.numel() - len(flag_ids))).indices
    return Look(tuple(ranked.tolist()), tuple(probs.tolist()))
