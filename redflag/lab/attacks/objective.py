"""The objective of adaptive attackers: the harmful answer should be likely, and the flag along it unlikely.

With T target tokens y behind a prompt, the logits of the T + 1 positions before and behind them, and flags F,

    J = -1/T sum_i log q(y_i | prompt, y_<i)  +  weight * 1/(T+1) sum_i max(0, logit p(F | prompt, y_<i) - goal)

where p is the model's distribution and q the same without the flags, as they are hidden from decoding. The flags' part
uses log-odds instead of log p, which is flat where p is near 1 and gives no gradient there. Values below `goal` are not
rewarded: no threshold is that low.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from redflag.backends.head import plain_model
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.attacks import Messages, Target, request_of
from redflag.prompt import text_ids


class Parts(NamedTuple):
    """The two parts of the objective for B candidates, each of shape `(B,)`."""

    response: torch.Tensor  # mean negative log-likelihood of the target's tokens, nats
    flags: torch.Tensor  # mean log-odds of the flags above the goal, nats

    def total(self, weight: float) -> torch.Tensor:
        """The objective, shape `(B,)`."""
        return self.response + weight * self.flags if weight else self.response


def losses(first: Parts, last: Parts) -> dict[str, Any]:
    """The parts before and after a search, as `detail` of an attempt."""
    return {
        "response_loss": [float(first.response), float(last.response)],
        "flag_loss": [float(first.flags), float(last.flags)],
    }


GOAL = -1.0
"""Log-odds that are low enough for an attacker: p = 0.27."""


def parts(logits: torch.Tensor, target_ids: torch.Tensor, flag_ids: torch.Tensor, goal: float = GOAL) -> Parts:
    """The objective from logits.

    Args:
        logits: Raw logits before each target token and behind the last, float, shape `(B, T + 1, V)`.
        goal: Log-odds below which a flag is low enough.
    """
    logits = logits.float()
    others = logits.index_fill(-1, flag_ids, -torch.inf)
    rest = others.logsumexp(-1)
    target_logits_of = others[:, :-1].gather(-1, target_ids.expand(len(logits), -1)[..., None])[..., 0]
    odds = logits.index_select(-1, flag_ids).logsumexp(-1) - rest
    return Parts((rest[:, :-1] - target_logits_of).mean(-1), (odds - goal).clamp_min(0.0).mean(-1))


class Harm:
    """One request with the beginning of its harm as target, and the position of a suffix in its prompt."""

    def __init__(self, target: Target, row: Row, suffix: str, target_tokens: int) -> None:
        """Renders the row's request with a suffix at the end of its last message.

        Raises:
            RedflagError: The suffix does not survive rendering.
        """
        self._target = target
        self._messages = request_of(row)
        ids = text_ids(target.tokenizer, suffix, target.spec)
        whole = target.prompt_ids(self.messages(suffix))
        starts = [i for i in range(len(whole)) if whole[i : i + len(ids)] == ids]
        if not ids or not starts:
            raise RedflagError(
                f"the initial suffix must keep its tokens in the prompt (got {suffix!r}). Use one that starts with a "
                "space and holds ordinary words."
            )
        self.before, self.suffix, self.after = whole[: starts[-1]], ids, whole[starts[-1] + len(ids) :]
        self.target = text_ids(target.tokenizer, row.response[row.onset or 0 :], target.spec)[:target_tokens]
        assert self.target, "a row's harm begins within its answer"

    def messages(self, suffix: str) -> Messages:
        """The conversation with a suffix."""
        *earlier, last = self._messages
        return [*earlier, {**last, "content": last["content"] + suffix}]

    def text(self, suffix_ids: Sequence[int]) -> str:
        """Text of a suffix."""
        return str(self._target.tokenizer.decode(list(suffix_ids)))

    def survives(self, suffix_ids: Sequence[int]) -> bool:
        """Whether the guard's own rendering of the suffix's text gives these ids and nothing else."""
        try:
            ids = self._target.prompt_ids(self.messages(self.text(suffix_ids)))
        except RedflagError:
            return False
        return ids == [*self.before, *suffix_ids, *self.after]


def fitting(target: Target, rows: Sequence[Row], least: int) -> list[Row]:
    """The rows whose request leaves room in the context for this many more tokens, and for 16 of an answer."""
    return [row for row in rows if target.fitting([(str(row.id), request_of(row))], least + 16)]


def target_logits(model: Any, embeds: torch.Tensor, target_tokens: int) -> torch.Tensor:
    """Raw logits before each of the last `target_tokens` positions and behind the last, shape `(B, T + 1, V)`."""
    positions = target_tokens + 1
    supported = "logits_to_keep" in inspect.signature(plain_model(model).forward).parameters
    few = {"logits_to_keep": positions} if supported else {}
    logits: torch.Tensor = model(inputs_embeds=embeds, use_cache=False, **few).logits
    return logits[:, -positions:]


def embed(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Input embeddings as the model's own forward makes them (scaled, with trained flag rows), shape `(N, H)`."""
    plain = plain_model(model)
    return plain.get_input_embeddings()(torch.tensor(list(ids), device=plain.device)).detach()
