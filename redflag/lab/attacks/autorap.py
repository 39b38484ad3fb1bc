"""AutoRAP: rank-assisted prefilling by a learned helper instead of a person (Vega & Singh, arXiv 2512.05518).

The helper reads prompt, response so far and one candidate, and says at the last token whether the response goes on to
do harm or turns into a refusal. It is trained for each target on the target's own refusals. The search takes the most
likely candidate that the helper calls harmful, goes back where there is none, and never takes a third token that reads
like the two before it.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from redflag.backends import Sampling
from redflag.backends.head import CACHE, backbone, plain_model
from redflag.backends.load import read_model
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.attacks import Attempt, Target, request_of
from redflag.lab.attacks.rap import RAP
from redflag.lab.attacks.search import Chooser
from redflag.lab.attacks.stepping import Looker, weights_of
from redflag.progress import Progress
from redflag.prompt import render_response, text_ids
from redflag.weights.prefix import PrefixSlot

HARMFUL, REFUSAL = 1, 0


@dataclass
class AutoRAP:
    """RAP with a helper that is trained on the target first. The defaults suit a nano model.

    The paper: helper Qwen2.5-1.5B-Instruct, 128 rows, all starters that were seen twice, 80 epochs, batch 64, learning
    rate 2e-5 falling to 0, budget 512.
    """

    helper: str | Path | None = None  # folder or hub name of the helper's model; None = a copy of the target
    # rows to train the helper on; None = the attacked rows, which helps the attacker. Answers of harmless rows serve as
    # refusals too: a target that never refuses after harm has no refusals of its own
    rows: Sequence[Row] | None = None
    k: int = 20
    budget: int = 128
    prefill_tokens: int = 3  # length of the harmful prefill, tokens
    max_new_tokens: int = 48
    train_rows: int = 64  # maximum number of harmful rows to train on, and of harmless ones
    starters: int = 8  # maximum number of tokens that are forced to get refusals
    refusals: int = 4
    refusal_tokens: int = 12  # maximum length of a refusal, tokens
    first_cut: int = 1  # minimum length of a harmful answer in an example, tokens; the paper has 10
    epochs: int = 8  # passes over the training rows, each with new cuts
    learning_rate: float = 5e-4  # AdamW's, falling to 0
    batch: int = 32
    name: str = "AutoRAP"
    adaptive: bool = True

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        helper, accuracy = self.train(target, rows if self.rows is None else self.rows, seed)
        about = {
            "helper_accuracy": accuracy,
            "helper_trained_on": "the attacked rows" if self.rows is None else "other rows",
        }
        search = RAP(
            k=self.k,
            budget=self.budget,
            prefills=(self.prefill_tokens,),
            max_new_tokens=self.max_new_tokens,
            chooser=lambda target, plan, prefill: helper_chooser(helper, target),
            name=self.name,
        )
        for attempt in search.run(target, rows, seed):
            yield replace(attempt, detail={**about, **attempt.detail})

    def train(self, target: Target, rows: Sequence[Row], seed: int) -> tuple[Helper, float]:
        """The helper, and its accuracy on a fifth of the rows that it was not trained on.

        Raises:
            RedflagError: There are too few harmful rows.
        """
        rng = random.Random(seed)
        shuffled = rng.sample(list(rows), len(rows))
        samples = self.samples(target, [row for row in shuffled if row.harmful][: self.train_rows], rng)
        for row in [row for row in shuffled if not row.harmful][: self.train_rows]:
            rendered = render_response(target.tokenizer, row.messages, target.spec)
            samples.append(Sample(rendered.prompt_ids, [], [rendered.response_ids]))
        rng.shuffle(samples)
        held_out = len(samples) // 5
        tests, trains = samples[:held_out], samples[held_out:]
        if not trains or not held_out:
            raise RedflagError(
                f"at least 5 harmful rows of several tokens are needed to train a helper (got {len(samples)})."
            )
        helper = Helper.of(target, self.helper, seed)
        steps = self.epochs * -(-len(trains) // self.batch)
        optimizer = torch.optim.AdamW(helper.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        with torch.enable_grad(), Progress("training the helper", steps, "steps") as progress:
            for _ in range(self.epochs):
                rng.shuffle(trains)
                for begin in range(0, len(trains), self.batch):
                    few = trains[begin : begin + self.batch]
                    examples = [example(sample, target.tokenizer, rng, self.first_cut) for sample in few]
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(
                        helper.margins([ids for ids, _ in examples]),
                        torch.tensor([float(label) for _, label in examples], device=helper.device),
                    )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    progress(schedule.last_epoch)
        examples = [example(sample, target.tokenizer, rng, self.first_cut) for sample in tests for _ in range(4)]
        with torch.inference_mode():
            predicted = helper.margins([ids for ids, _ in examples]) > 0
        right = sum(bool(yes) == (label == HARMFUL) for yes, (_, label) in zip(predicted, examples, strict=True))
        return helper, right / len(examples)

    def samples(self, target: Target, rows: Sequence[Row], rng: random.Random) -> list[Sample]:
        """The harmful answers from their onset on, each with refusals of the target's.

        Each answer is cut at random; tokens among the top k behind the cut in at least two rows are starters; each
        starter is forced behind the cut and the answer decoded greedily. (The paper's targets then refuse, because they
        were trained to. Another target's harmful text would be labelled a refusal.)
        """
        look = Looker(target, self.name, self.k)
        usable = []
        for row in rows:
            answer = text_ids(target.tokenizer, row.response[row.onset or 0 :], target.spec)
            if len(answer) > 1:
                usable.append((target.prompt_ids(request_of(row)), answer))
        cuts = [[*prompt, *answer[: rng.randrange(1, len(answer))]] for prompt, answer in usable]
        seen = Counter(token for cut in cuts for token in look(cut).candidates if token not in target.backend.eos_ids)
        # The model's first tokens without any harm before them: first tokens of refusals rank high there.
        first = Counter(token for prompt, _ in usable for token in look(prompt).candidates)
        twice = [token for token, count in seen.items() if count >= 2]
        starters = sorted(twice, key=lambda token: (-first[token], -seen[token], token))[: self.starters]
        pairs = [
            (i, [*cut, starter])
            for i, cut in enumerate(cuts)
            for starter in rng.sample(starters, min(self.refusals, len(starters)))
        ]
        sampling = Sampling(max_new_tokens=self.refusal_tokens - 1, temperature=0.0)
        decoded = target.backend.complete([ids for _, ids in pairs], sampling, batch_size=target.batch_size)
        refusals: list[list[list[int]]] = [[] for _ in usable]
        for (i, ids), steps in zip(pairs, decoded, strict=True):
            refusals[i].append([ids[-1], *(s.token_id for s in steps if s.token_id not in target.backend.eos_ids)])
        return [Sample(*pair, some) for pair, some in zip(usable, refusals, strict=True) if some]


@dataclass(frozen=True)
class Sample:
    """A prompt with a harmful answer and refusals, or with no harmful one, as ids of the target's tokenizer."""

    prompt_ids: list[int]
    harmful_ids: list[int]
    refusals: list[list[int]]


def example(sample: Sample, tokenizer: Any, rng: random.Random, first_cut: int) -> tuple[list[int], int]:
    """One training text and its label at the last token, drawn as the paper draws them.

    The answer is cut behind a random punctuation mark, or with equal chance at a random token from `first_cut` on
    (earlier in short ones). With a chance of one half, 1 to 5 tokens of a refusal follow.
    """
    answer = sample.harmful_ids
    if not answer:
        refusal = rng.choice(sample.refusals)
        return [*sample.prompt_ids, *refusal[: rng.randint(1, len(refusal))]], REFUSAL
    marks = [i + 1 for i, token in enumerate(answer) if str(tokenizer.decode([token])).strip() in tuple(".,;:!?")]
    cut = rng.randint(min(first_cut, max(1, len(answer) // 2)), len(answer))
    if marks and rng.random() < 0.5:
        cut = rng.choice(marks)
    ids = [*sample.prompt_ids, *answer[:cut]]
    if rng.random() < 0.5:
        return ids, HARMFUL
    refusal = rng.choice(sample.refusals)
    return ids + refusal[: rng.randint(1, min(5, len(refusal)))], REFUSAL


class Helper:
    """A causal language model with a head that classifies the last token: harmful, or a refusal."""

    def __init__(self, model: Any, tokenizer: Any, target_tokenizer: Any, seed: int) -> None:
        """Takes over a model, which is changed by training; `tokenizer` is None if it shares the target's ids."""
        plain = plain_model(model)
        self._body = backbone(model).eval()
        self._config = plain.config.get_text_config()
        self.device: torch.device = plain.device
        size = plain.get_input_embeddings().weight.shape[1]
        weight = torch.randn((2, size), generator=torch.Generator().manual_seed(seed)) * 0.02
        self._head = weight.to(self.device).requires_grad_()
        self._tokenizer = tokenizer
        self._target_tokenizer = target_tokenizer
        self._slot = PrefixSlot()

    @classmethod
    def of(cls, target: Target, name: str | Path | None, seed: int) -> Helper:
        """A helper from a folder or the hub, or, by None, from a copy of the target."""
        if name is None:
            model = copy.deepcopy(weights_of(target, "AutoRAP"))
            return cls(model.float(), None, target.tokenizer, seed)
        model, tokenizer = read_model(name, torch.float32)
        model = model.to(plain_model(target.model).device)
        same = all(tokenizer.get_vocab().get(word) == i for word, i in target.tokenizer.get_vocab().items())
        return cls(model, None if same else tokenizer, target.tokenizer, seed)

    def parameters(self) -> list[torch.Tensor]:
        return [*self._body.parameters(), self._head]

    def encode(self, token_ids: Sequence[int]) -> list[int]:
        """The target's ids in the helper's: by way of their text where the tokenizers differ."""
        if self._tokenizer is None:
            return list(token_ids)
        text = self._target_tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def margins(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Log-odds of harm at the last token of each text of the target's ids, shape `(B,)`."""
        rows = [self.encode(ids) for ids in texts]
        width = max(map(len, rows))
        inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        # Padding on the right does not affect earlier positions.
        hidden = self._body(input_ids=inputs, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        return self._margin(last)

    @torch.inference_mode()
    def harmful(self, token_ids: Sequence[int], candidates: Sequence[int]) -> list[bool]:
        """Whether the text goes on to do harm with each of the candidates behind it."""
        if self._tokenizer is not None:
            return (self.margins([[*token_ids, token] for token in candidates]) > 0).tolist()
        ids = list(token_ids)
        taken = self._slot.take([*ids, -1])
        cache, held = taken if taken is not None else (DynamicCache(config=self._config), 0)
        if held < len(ids):
            inputs = torch.tensor([ids[held:]], device=self.device)
            self._body(input_ids=inputs, use_cache=True, **{CACHE: cache})
        wide = copy.deepcopy(cache)
        wide.batch_repeat_interleave(len(candidates))
        self._slot.put(cache, ids)
        inputs = torch.tensor(list(candidates), device=self.device)[:, None]
        hidden = self._body(input_ids=inputs, use_cache=True, **{CACHE: wide}).last_hidden_state
        return (self._margin(hidden[:, -1]) > 0).tolist()

    def _margin(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden.float() @ self._head.T
        return logits[:, HARMFUL] - logits[:, REFUSAL]


def helper_chooser(helper: Helper, target: Target, at_once: int = 4) -> Chooser:
    """Picks the most likely candidate that the helper calls harmful, and no third token that reads like the last two.

    Args:
        at_once: Candidates per batch; usually one of the first is taken.
    """

    def text(token: int) -> str:
        return str(target.tokenizer.decode([token]))

    def choose(prompt_ids: Sequence[int], response_ids: Sequence[int], candidates: Sequence[int]) -> int | None:
        last = [text(token) for token in response_ids[-2:]]
        for begin in range(0, len(candidates), at_once):
            few = candidates[begin : begin + at_once]
            harmful = helper.harmful([*prompt_ids, *response_ids], few)
            for index, (token, yes) in enumerate(zip(few, harmful, strict=True)):
                if yes and last != [text(token)] * 2:
                    return begin + index
        return None

    return choose
