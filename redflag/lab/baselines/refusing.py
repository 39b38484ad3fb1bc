"""Models trained to refuse, read as detectors: how much probability the refusal has.

`refusal_tokens` is read once, before the first token (refusal tokens, arXiv 2412.06748). `deep_alignment` refuses
behind harmful beginnings (arXiv 2406.05946), `refusal_everywhere` at every position of a harmful response (RTO, DeRTa,
arXiv 2407.09121); both are read before every token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from redflag.data.rows import Row
from redflag.files import keep_json, kept_json
from redflag.flags import Flag, FlagSpec, attach
from redflag.lab.baselines.own_softmax import OwnSoftmax
from redflag.lab.baselines.shared import BaselineContext, Read, digest, model_stamp, thinned
from redflag.lab.baselines.tuning import IGNORE, Example, Tuning, fine_tune
from redflag.truncation import fit_prompt

Labels = Literal["onset", "response"]

# They begin alike, with a word that harmless text does not begin with: its probability is what is read.
REFUSALS = (
    "Sorry, I can't help with that.",
    "Sorry, but I won't assist with this request.",
    "Sorry, this could hurt somebody, so I will not go on.",
)
MARKS = FlagSpec((Flag("refuse", "[refuse]"), Flag("respond", "[respond]")))
_LONGEST = 100  # tokens of a harmful beginning, as in arXiv 2406.05946


@dataclass(kw_only=True)
class RefusalBaseline(OwnSoftmax):
    """A base model trained to refuse, and the probability of that."""

    model: Path  # folder of the trained model, an ordinary one that attacks can be run against
    # (rows, random generator, ids of the marks) -> training examples of one pass
    examples: Callable[[Sequence[Read], random.Random, Sequence[int]], list[Example]]
    watched: tuple[int, ...]  # ids whose summed probability is the score; empty = that of the mark [refuse]
    most_rows: int | None  # maximum number of training rows
    tuning: Tuning

    note = (
        "takes the place of the model: one probability of its own softmax is read {when}, nothing comes on top; the "
        "time is that of its own forward pass, batched, spread over the response's tokens"
    )

    def fit(self, train: Sequence[Row]) -> None:
        """Trains, or loads the model that an earlier run trained."""
        from redflag.backends.hf import HFBackend
        from redflag.backends.load import read_model

        context = self.context
        rows = thinned(train, self.most_rows, context.seed)
        key = digest(
            [
                [self.name, self.what, self.watched, asdict(self.tuning), context.seed, context.limit],
                [row.to_dict() for row in rows],
                model_stamp(context.base),
            ]
        )
        done = self.model / "trained.json"
        if record := kept_json(done, fingerprint=key):
            model, _ = read_model(self.model, "auto")
            self.watched = tuple(record["watched"])
        else:
            done.unlink(missing_ok=True)
            model, tokenizer = read_model(context.base, "auto")
            marks = () if self.watched else attach(model, tokenizer, MARKS).ids
            self.watched = self.watched or marks[:1]
            reads = context.read(rows)
            model = fine_tune(
                model.to(context.device),
                lambda number: self.examples(reads, random.Random(f"{context.seed}/{number}"), marks),
                self.tuning,
                seed=context.seed,
                new_rows=marks,
            )
            model.save_pretrained(self.model)
            tokenizer.save_pretrained(self.model)
            keep_json(done, {"fingerprint": key, "watched": self.watched})
        flags = tuple(Flag(f"refusal {i}", id=token) for i, token in enumerate(self.watched))
        model = model.to(context.device)
        self._backend = HFBackend(model, context.tokenizer, FlagSpec(flags), reuse_prefix=False)


def refusal_tokens(
    context: BaselineContext,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    most_rows: int | None = None,
    tuning: Tuning | None = None,
) -> RefusalBaseline:
    """[refuse] or [respond] before every answer, plain fine-tuning on token and answer (arXiv 2412.06748).

    Harmful rows are answered by [refuse] and a refusal, harmless ones by [respond] and their response.
    """
    texts = [_ids(context, text) for text in refusals]

    def examples(reads: Sequence[Read], draw: random.Random, marks: Sequence[int]) -> list[Example]:
        answers = [
            [marks[0], *draw.choice(texts), *read.judged_ids[read.tokens :]]
            if read.row.harmful
            else [marks[1], *read.judged_ids]
            for read in reads
        ]
        return [_example(context, *pair) for pair in zip(reads, answers, strict=True)]

    what = (
        "Refusal tokens: the base model fine-tuned to begin with [refuse] and a refusal (harmful rows) or [respond] "
        f"and the response (harmless rows); p([refuse]) at position 0 holds for the whole response; {_on(most_rows)}"
    )
    return RefusalBaseline(
        name="refusal tokens",
        what=what,
        context=context,
        at_first=True,
        model=folder,
        examples=examples,
        watched=(),
        most_rows=most_rows,
        tuning=tuning or Tuning(),
    )


def _refusing(
    everywhere: bool,
    context: BaselineContext,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    labels: Labels = "onset",
    first_step: int = 1,
    most_rows: int | None = None,
    tuning: Tuning | None = None,
) -> RefusalBaseline:
    """A model that refuses in the middle of harmful responses.

    `deep_alignment` (arXiv 2406.05946): half of the refusals follow the first tokens of a harmful response, and
    the loss is on the refusal alone. `refusal_everywhere` (DeRTa, arXiv 2407.09121): by the toss of a coin that, or a
    refusal's first token as target of every position of the harmful response. Harmless rows, with their own responses,
    are the anchor.

    At step 0 such a model refuses requests, whose harmless answers look no different yet: that step is not read.

    Args:
        labels: "onset": a beginning reaches past the onset, and positions count from it, where it is known. "response":
            anywhere in the response, as published.
    """
    texts = [_ids(context, text) for text in refusals]
    starts = tuple(sorted({text[0] for text in texts}))

    def examples(reads: Sequence[Read], draw: random.Random, marks: Sequence[int]) -> list[Example]:
        made = []
        for read in reads:
            if not read.row.harmful:
                made.append(_example(context, read, read.judged_ids))
            elif everywhere and draw.random() >= 0.5:
                onset = min(read.onset or 0, len(read.judged_ids)) if labels == "onset" else 0
                targets = [IGNORE] * (len(read.prompt_ids) + onset) + [texts[0][0]] * (len(read.judged_ids) - onset)
                made.append(Example(read.prompt_ids + read.judged_ids, targets))
            else:
                made.append(_behind_harm(context, read, draw, draw.choice(texts), labels))
        return made

    cut = "past the onset, where it is known" if labels == "onset" else "anywhere in it"
    after = f" from step {first_step} on (before, the request is refused)" if first_step else ""
    if everywhere:
        what = (
            "Refusal at every position (RTO): the base model fine-tuned to begin a refusal at every position of a "
            f"harmful response ({cut}) or behind its beginning, with harmless rows as anchor; probability that a "
            f"refusal begins, at every step{after}; {_on(most_rows)}"
        )
    else:
        what = (
            "Deep alignment: the base model fine-tuned to refuse, half the time behind the first tokens of the harmful "
            f"response ({cut}), with harmless rows as anchor; probability that a refusal begins, at every "
            f"step{after}; {_on(most_rows)}"
        )
    return RefusalBaseline(
        name="refusal at every position" if everywhere else "deep alignment",
        what=what,
        context=context,
        # Despite its description, refusal at every position is recorded from step 0 on: reported figures are of that.
        first_step=0 if everywhere else first_step,
        model=folder,
        examples=examples,
        watched=starts,
        most_rows=most_rows,
        tuning=tuning or Tuning(),
    )


deep_alignment = partial(_refusing, False)
refusal_everywhere = partial(_refusing, True)


def _behind_harm(
    context: BaselineContext, read: Read, draw: random.Random, refusal: list[int], labels: Labels
) -> Example:
    """By the toss of a coin a plain refusal, or one behind 1 to 100 tokens of the harmful response."""
    refusal = [*refusal, *read.judged_ids[read.tokens :]]
    count = 0
    if draw.random() < 0.5:
        least = min((read.onset or 0) + 1, read.tokens) if labels == "onset" else 1
        count = draw.randint(least, max(least, min(_LONGEST, read.tokens)))
    return _example(context, read, read.judged_ids[:count] + refusal, count)


def _example(context: BaselineContext, read: Read, answer: list[int], begun: int = 0) -> Example:
    """The answer after the prompt, which is cut if both do not fit; its first `begun` tokens are not targets."""
    prompt = read.prompt_ids
    if context.limit is not None:
        answer = answer[: context.limit - 1]
        room = context.limit - len(answer)
        prompt = fit_prompt(context.tokenizer, read.row.messages[:-1], context.spec, room, prompt)
    begun = min(begun, len(answer))
    return Example(prompt + answer, [IGNORE] * (len(prompt) + begun) + answer[begun:])


def _ids(context: BaselineContext, text: str) -> list[int]:
    return list(context.tokenizer(text, add_special_tokens=False)["input_ids"])


def _on(most_rows: int | None) -> str:
    if most_rows is None:
        return "trained on the same rows as the flag."
    return f"trained on at most {most_rows} of the flag's rows, drawn by seed."
