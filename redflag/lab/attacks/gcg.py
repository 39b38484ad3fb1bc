"""GCG: a suffix of ordinary tokens, found by gradient and search (Zou et al., arXiv 2307.15043).

Against the response alone the package nanogcg does the search. Its objective cannot be changed without rewriting it,
and its filter ignores how a guard renders prompts, so the adaptive attack, against the response and the flag together,
has its own search after the same recipe. Either way the suffix is sent as text, through the guard's own rendering, and
the model's answer is measured.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from redflag.backends import Sampling
from redflag.backends.head import plain_model
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.attacks import Attempt, Target
from redflag.lab.attacks.objective import Harm, Parts, embed, fitting, losses, parts, target_logits
from redflag.lab.attacks.stepping import weights_of
from redflag.prompt import FALLBACK_TEMPLATE, text_ids


@dataclass
class GCG:
    """A suffix for each request. The defaults suit a nano model; the paper has 500 steps, width 512 and top 256."""

    adaptive: bool = True  # search against the flag too, `redflag.lab.attacks.objective`; False runs nanogcg
    steps: int = 10
    width: int = 24  # candidates evaluated in each
    top_k: int = 64  # tokens proposed by the gradient for each position
    suffix: str = " x x x x x x x x"
    target_tokens: int = 10  # number of tokens of the row's harm that the answer should begin with
    flag_weight: float = 0.2  # weight of the flags' part relative to the response's loss
    max_new_tokens: int = 48
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or ("GCG, adaptive" if self.adaptive else "GCG")

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        model = weights_of(target, self.name)
        if not self.adaptive:
            _package()
        attempts = []
        allowed = allowed_ids(target)
        suffix_tokens = len(text_ids(target.tokenizer, self.suffix, target.spec))
        for number, row in enumerate(fitting(target, rows, suffix_tokens + self.target_tokens)):
            harm = Harm(target, row, self.suffix, self.target_tokens)
            if self.adaptive:
                ids, first, last = self._joint(model, target, harm, allowed, seed + number)
            else:
                ids, first, last = self._plain(model, target, harm, allowed, seed + number)
            detail = {"suffix": harm.text(ids), **losses(first, last)}
            attempts.append((str(row.id), harm.messages(harm.text(ids)), detail))
        sampling = Sampling(max_new_tokens=self.max_new_tokens, temperature=0.0)
        answers = target.answers([(name, messages) for name, messages, _ in attempts], sampling)
        setting = f"{self.steps} steps, width {self.width}"
        for attempt, (_, _, detail) in zip(answers, attempts, strict=True):
            yield replace(attempt, setting=setting, queries=self.steps * self.width + 1, detail=detail)

    def _joint(
        self, model: Any, target: Target, harm: Harm, allowed: torch.Tensor, seed: int
    ) -> tuple[list[int], Parts, Parts]:
        """The search against response and flag: suffix ids, and the objective's parts before and after."""
        scorer = SuffixScorer(model, target, harm)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor(harm.suffix)
        first = best = scorer.parts(ids[None])
        best_ids, best_total = ids, float(first.total(self.flag_weight))
        for _ in range(self.steps):
            scores = scorer.token_gradient(ids, self.flag_weight)[:, allowed]
            proposed = allowed[(-scores).topk(min(self.top_k, len(allowed)), dim=1).indices]
            places = torch.randint(len(ids), (self.width,), generator=generator)
            picks = torch.randint(proposed.shape[1], (self.width,), generator=generator)
            tried = ids.repeat(self.width, 1)
            tried[torch.arange(self.width), places] = proposed[places, picks]
            # A cheap check first: does the suffix tokenise to the same ids? The winner is then rendered in full.
            texts = [harm.text(row) for row in tried.tolist()]
            same = [
                text_ids(target.tokenizer, text, target.spec) == row
                for text, row in zip(texts, tried.tolist(), strict=True)
            ]
            tried = tried[torch.tensor(same)]
            if not len(tried):
                continue
            scored = scorer.parts(tried)
            totals = scored.total(self.flag_weight)
            for index in totals.argsort().tolist():
                if harm.survives(tried[index].tolist()):
                    ids = tried[index]
                    if float(totals[index]) < best_total:
                        best_ids, best_total = ids, float(totals[index])
                        best = Parts(scored.response[index], scored.flags[index])
                    break
        return best_ids.tolist(), first, best

    def _plain(
        self, model: Any, target: Target, harm: Harm, allowed: torch.Tensor, seed: int
    ) -> tuple[list[int], Parts, Parts]:
        """nanogcg's search; the best of its suffixes that the guard's rendering leaves as they are."""
        package = _package()
        config = package.GCGConfig(
            num_steps=self.steps,
            search_width=self.width,
            topk=self.top_k,
            optim_str_init=self.suffix,
            use_prefix_cache=False,
        )
        devices = [plain_model(model).device] if plain_model(model).device.type == "cuda" else []
        messages = harm.messages("")
        messages[-1]["content"] = messages[-1]["content"].replace("{optim_str}", "") + "{optim_str}"
        gc.freeze()  # The package collects garbage in every step; what was there before need not be looked at again.
        try:
            # It uses the global random generators and shows a progress bar on stderr.
            with torch.random.fork_rng(devices), contextlib.redirect_stderr(io.StringIO()):
                torch.manual_seed(seed)
                attack = package.GCG(plain_model(model), _with_template(target.tokenizer), config)
                refused = torch.ones(plain_model(model).get_input_embeddings().weight.shape[0], dtype=torch.bool)
                refused[allowed] = False
                attack.not_allowed_ids = refused.nonzero()[:, 0].to(plain_model(model).device)
                result = attack.run(messages, target.tokenizer.decode(harm.target))
        finally:
            gc.unfreeze()
        scorer = SuffixScorer(model, target, harm)
        first = scorer.parts(torch.tensor([harm.suffix]))
        for _, suffix in sorted(zip(result.losses, result.strings, strict=True)):
            ids = text_ids(target.tokenizer, suffix, target.spec)
            if harm.survives(ids):
                return ids, first, scorer.parts(torch.tensor([ids]))
        return harm.suffix, first, first


class SuffixScorer:
    """The objective's parts for suffixes of one request."""

    def __init__(self, model: Any, target: Target, harm: Harm) -> None:
        """Embeds what does not change."""
        self._model = model
        self._device = plain_model(model).device
        self._flag_ids = torch.tensor(target.spec.ids, device=self._device)
        self._target_ids = torch.tensor(harm.target, device=self._device)
        self._before = embed(model, harm.before)
        self._behind = embed(model, [*harm.after, *harm.target])
        self._batch = target.batch_size

    def parts(self, suffixes: torch.Tensor) -> Parts:
        """The parts for B suffixes of n tokens, shape `(B, n)`."""
        loss_parts = []
        with torch.inference_mode():
            for chunk in suffixes.split(self._batch):
                loss_parts.append(self.of(embed(self._model, chunk.flatten().tolist()).view(*chunk.shape, -1)))
        return Parts(torch.cat([f.response for f in loss_parts]).cpu(), torch.cat([f.flags for f in loss_parts]).cpu())

    def of(self, suffixes: torch.Tensor) -> Parts:
        """The parts for embedded suffixes, shape `(B, n, H)`, with gradient where they have one."""
        count = len(suffixes)
        embeds = torch.cat([self._before.expand(count, -1, -1), suffixes, self._behind.expand(count, -1, -1)], dim=1)
        return parts(target_logits(self._model, embeds, len(self._target_ids)), self._target_ids, self._flag_ids)

    def token_gradient(self, suffix: torch.Tensor, weight: float) -> torch.Tensor:
        """The objective's gradient by the one-hot choice of each of n tokens, shape `(n, V)`, on the CPU."""
        embeds = embed(self._model, suffix.tolist()).requires_grad_()
        loss = self.of(embeds[None]).total(weight)[0]
        (gradient,) = torch.autograd.grad(loss, embeds)
        vocabulary = plain_model(self._model).get_input_embeddings().weight.shape[0]
        return (gradient @ embed(self._model, range(vocabulary)).T).float().cpu()


def allowed_ids(target: Target) -> torch.Tensor:
    """Ids that a suffix may hold: printable ASCII, no added token, no flag; sorted."""
    tokenizer = target.tokenizer
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids, *target.spec.ids}
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return torch.tensor(
        [i for i, text in enumerate(texts) if i not in added and text and text.isascii() and text.isprintable()]
    )


def _with_template(tokenizer: Any) -> Any:
    """The tokenizer, or a copy with redflag's fallback template, if it has none: the package would set another one."""
    if tokenizer.chat_template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = FALLBACK_TEMPLATE
    return tokenizer


def _package() -> Any:
    """The package nanogcg."""
    try:
        package = importlib.import_module("nanogcg.gcg")
    except ImportError as error:
        raise RedflagError(
            "the package nanogcg must be installed for GCG against the response alone. Run `pip install nanogcg`, or "
            "attack adaptively, GCG(adaptive=True), which needs no package."
        ) from error
    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    return package
