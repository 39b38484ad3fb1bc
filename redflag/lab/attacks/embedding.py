"""An attack in embedding space, the strongest one with access to the weights (Schwinn et al., arXiv 2402.09063).

The embeddings of a suffix of the request are optimised by signed gradient steps until a harmful answer is likely and
the flag along it is not. The result isn't a text; it is an upper bound for any suffix of that length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import torch
from transformers import DynamicCache

from redflag.backends.head import CACHE, plain_model
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.attacks import Attempt, Target, request_of
from redflag.lab.attacks.gcg import SuffixScorer
from redflag.lab.attacks.objective import Harm, Parts, embed, fitting, losses
from redflag.lab.attacks.stepping import look_at, room_for, weights_of
from redflag.prompt import text_ids


@dataclass
class EmbeddingAttack:
    """A continuous suffix for each request, begun from the request's own words.

    For adversarial training such attacks are run with step 1e-4, 10 iterations and radius 0.05 (l2) on 7B models
    (Xhonneux et al., arXiv 2405.15589); the defaults here are those of an attacker, without a radius.
    """

    suffix_tokens: int = 8
    iterations: int = 40
    step: float = 0.05
    radius: float | None = None  # maximum shift of an embedding; None = no bound
    norm: Literal["l2", "linf"] = "l2"
    target_tokens: int = 10  # number of tokens of the row's harm that the answer should begin with
    flag_weight: float = 0.3  # weight of the flags' part of the objective; 0 attacks the response alone
    max_new_tokens: int = 48
    name: str = "embedding"
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "linf"):
            raise RedflagError(f"norm must be l2 or linf (got {self.norm!r}).")
        self.adaptive = self.flag_weight > 0

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        """Nothing is random, so the seed has no effect.

        An attempt's messages are the request without the suffix, which has no text.
        """
        model = weights_of(target, self.name)
        bound = "no bound" if self.radius is None else f"{self.norm} {self.radius:g}"
        for row in fitting(target, rows, self.suffix_tokens + max(self.target_tokens, 1)):
            words = request_of(row)[-1]["content"]
            # A text that survives rendering locates the suffix; its embeddings need not correspond to a text.
            harm = Harm(target, row, " x", self.target_tokens)
            harm.suffix = list(islice(cycle(text_ids(target.tokenizer, words, target.spec)), self.suffix_tokens))
            suffix, first, last = self._search(model, target, harm)
            prompt = torch.cat([embed(model, harm.before), suffix, embed(model, harm.after)])
            room = room_for(target, range(len(prompt)), self.max_new_tokens)
            ids, probs = decode_embedded(model, target, prompt, room)
            yield Attempt(
                str(row.id),
                f"{self.iterations} steps, {bound}",
                request_of(row),
                target.decode(ids),
                ids,
                probs,
                queries=self.iterations + 1,
                detail=losses(first, last),
            )

    def _search(self, model: Any, target: Target, harm: Harm) -> tuple[torch.Tensor, Parts, Parts]:
        """The attacked suffix, shape `(n, H)`, and the objective's parts before and after."""
        scorer = SuffixScorer(model, target, harm)
        start = embed(model, harm.suffix)
        moved = torch.zeros_like(start)
        best, best_total = moved, float("inf")
        first = last = None
        for iteration in range(self.iterations + 1):
            here = (start + moved).requires_grad_()
            loss_parts = scorer.of(here[None])
            total = loss_parts.total(self.flag_weight)[0]
            value = total.item()
            reached = Parts(*(part.detach() for part in loss_parts))
            first = first or reached
            if value < best_total:
                best, best_total, last = moved, value, reached
            if iteration < self.iterations:
                (gradient,) = torch.autograd.grad(total, here)
                moved = self.project(moved - self.step * gradient.sign())
        assert first is not None and last is not None
        return start + best, first, last

    def project(self, moved: torch.Tensor) -> torch.Tensor:
        """The nearest displacements within the radius, shape `(n, H)`; each place has a ball of its own."""
        if self.radius is None:
            return moved
        if self.norm == "linf":
            return moved.clamp(-self.radius, self.radius)
        return moved * (self.radius / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


@torch.inference_mode()
def decode_embedded(
    model: Any, target: Target, prompt: torch.Tensor, max_new_tokens: int
) -> tuple[list[int], list[tuple[float, ...]]]:
    """Greedy answer to a prompt that is embeddings, measured as a guard measures.

    Returns:
        T token ids and T x K flag probabilities before them.
    """
    plain = plain_model(model)
    flag_ids = torch.tensor(target.spec.ids, device=plain.device)
    cache = DynamicCache(config=plain.config.get_text_config())
    ids: list[int] = []
    probs: list[tuple[float, ...]] = []
    inputs = prompt[None]
    while len(ids) < max_new_tokens:
        logits = model(inputs_embeds=inputs, use_cache=True, **{CACHE: cache}).logits[0, -1].float()
        look = look_at(logits, flag_ids, 1)
        ids.append(look.candidates[0])
        probs.append(look.flag_probs)
        if ids[-1] in target.backend.eos_ids:
            break
        inputs = embed(model, ids[-1:])[None]
    return ids, probs
