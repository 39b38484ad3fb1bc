"""Models trained to refuse, read as detectors: how much probability the refusal has.

`refusal_tokens` is read once, before the first token (refusal tokens, arXiv 2412.06748). `deep_alignment` refuses
behind harmful beginnings (arXiv 2406.05946), `refusal_everywhere` at every position of a harmful response (RTO, DeRTa,
arXiv 2407.09121); both are read before every token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from redflag.data.rows import Row
from redflag.lab.baselines.shared import BaselineContext, trained_on
from redflag.lab.baselines.trained import Trained
from redflag.lab.baselines.tuning import IGNORE, SMALL, Tuning, fine_tune

Labels = Literal["onset", "response"]

# They begin alike, with a word that harmless text does not begin with: its probability is what is read.
REFUSALS = (
    "Sorry, I can't help with that.",
    "Sorry, but I won't assist with this request.",
    "Sorry, this could hurt somebody, so I will not go on.",
)
_READ = (
    "with harmless rows as anchor; probability that a refusal begins, at every step from step 1 on (before, the "
    "request is refused)"
)


def refusal_tokens(
    context: BaselineContext,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    most_rows: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """A token before refusals, plain fine-tuning on token and answer (arXiv 2412.06748).

    Harmful rows are answered by the token and a refusal, harmless ones by their response. `settings` are options of
    `redflag train`, in place of the usual rates and batches.
    """

    def rows_of(rows: Sequence[Row]) -> list[Row]:
        draw = random.Random(context.seed)
        return [_answer(row, draw.choice(refusals), category="harm") if row.harmful else row for row in rows]

    return Trained(
        name="refusal tokens",
        what="Refusal tokens: the base model fine-tuned to begin with a token of its own and a refusal (harmful rows) "
        "or with the response (harmless rows); the token's probability at position 0 holds for the whole response; "
        f"{trained_on(most_rows)}",
        context=context,
        model=folder,
        # Plain fine-tuning: cross-entropy on the answers, no reference to stay close to.
        settings={
            "placement": "open",
            "answers": "all",
            "answer_coef": 1.0,
            "keep_coef": 0.0,
            **_settings(context, settings),
        },
        most_rows=most_rows,
        rows_of=rows_of,
        at_first=True,
    )


def deep_alignment(
    context: BaselineContext,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    labels: Labels = "onset",
    most_rows: int | None = None,
    tuning: Tuning | None = None,
) -> Trained:
    """Half of the refusals follow the first tokens of a harmful response; the loss is on the refusal alone.

    Harmless rows, with their own responses, are the anchor.

    Args:
        labels: "onset": a beginning reaches past the onset, where it is known. "response": anywhere in the response, as
            published.
    """

    def rows_of(rows: Sequence[Row]) -> list[Row]:
        draw = random.Random(context.seed)
        return [_refusal(context, row, draw, refusals, labels) if row.harmful else row for row in rows]

    tuning = tuning or Tuning()
    return Refusing(
        name="deep alignment",
        what="Deep alignment: the base model fine-tuned to refuse, half the time behind the first tokens of the "
        f"harmful response ({_where(labels)}), {_READ}; {trained_on(most_rows)}",
        context=context,
        model=folder,
        settings=asdict(tuning),
        tuning=tuning,
        most_rows=most_rows,
        rows_of=rows_of,
        watched=_first_tokens(context, refusals),
    )


def refusal_everywhere(
    context: BaselineContext,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    labels: Labels = "onset",
    most_rows: int | None = None,
    tuning: Tuning | None = None,
) -> Trained:
    """As `deep_alignment`, but by the toss of a coin a refusal is the target at every position of a harmful response.

    With "onset" positions count from the onset on, where it is known.
    """

    def rows_of(rows: Sequence[Row]) -> list[Row]:
        draw = random.Random(context.seed)
        result = []
        for row in rows:
            if row.harmful and draw.random() < 0.5:
                onset = row.onset if labels == "onset" else None
                result.append(_answer(row, row.response, category="harm", onset=onset))
            else:
                result.append(_refusal(context, row, draw, refusals, labels) if row.harmful else row)
        return result

    tuning = tuning or Tuning()
    return Refusing(
        name="refusal at every position",
        what="Refusal at every position (RTO): the base model fine-tuned to begin a refusal at every position of a "
        f"harmful response ({_where(labels)}) or behind its beginning, {_READ}; {trained_on(most_rows)}",
        context=context,
        model=folder,
        settings=asdict(tuning),
        tuning=tuning,
        most_rows=most_rows,
        rows_of=rows_of,
        watched=_first_tokens(context, refusals),
    )


@dataclass(kw_only=True)
class Refusing(Trained):
    """Trained on ids that `redflag train` does not make of any text: see `example`."""

    tuning: Tuning

    def _train(self, rows: Sequence[Row]) -> None:
        from redflag.backends.load import read_model

        model, tokenizer = read_model(self.context.base, "auto")
        examples = [self.example(row) for row in rows]
        model = fine_tune(model.to(self.context.device), examples, self.tuning, seed=self.context.seed)
        model.save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)

    def example(self, row: Row) -> dict[str, list[int]]:
        """Ids and their targets.

        In a row with a category every target from its onset on is the beginning of a refusal. Behind the beginning of
        an answer a refusal has the ids that it has at once: behind a space its first word is another token, which
        models write less readily there and learn more slowly.
        """
        from redflag.training.encode import encode

        begin = row.prefill if row.category is None else row.onset or 0
        encoded = encode(
            replace(row, category=None, onset=None, prefill=begin),
            self.context.tokenizer,
            self.context.spec,
            self.context.limit,
        )
        ids, start = encoded["input_ids"], encoded["response_start"] + encoded.get("prefill", 0)
        if row.prefill is not None:
            text = row.response[row.prefill :]
            spaced, plain = (
                self.context.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text.lstrip())
            )
            ids = [*ids[:start], *plain, *ids[start + len(spaced) :]][: self.context.limit]
        targets = ids[start:] if row.category is None else [self.watched[0]] * (len(ids) - start)
        return {"input_ids": ids, "labels": [IGNORE] * start + targets}


def _settings(context: BaselineContext, settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if settings is not None:
        return settings
    small = (context.forward_flops or math.inf) <= 2 * SMALL
    return {
        "full": small,
        "learning_rate": 5e-4 if small else 2e-4,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 50,
    }


def _refusal(context: BaselineContext, row: Row, draw: random.Random, refusals: Sequence[str], labels: Labels) -> Row:
    """By the toss of a coin a plain refusal, or one behind 1 to 100 tokens of the harmful response."""
    from redflag.training.answers import drawn_prefill

    refusal = f" {draw.choice(refusals)}"
    onset = row.onset if labels == "onset" else None
    before = drawn_prefill(row.response, refusal, context.tokenizer, draw, onset=onset)
    return _answer(row, before + refusal, prefill=len(before))


def _answer(row: Row, text: str, **labels: Any) -> Row:
    """The row's conversation with another answer."""
    messages = [*row.messages[:-1], {"role": "assistant", "content": text}]
    return Row(messages, group=row.group, id=row.id, **labels)


def _first_tokens(context: BaselineContext, refusals: Sequence[str]) -> tuple[int, ...]:
    firsts = (context.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in refusals)
    return tuple(dict.fromkeys(firsts))


def _where(labels: Labels) -> str:
    return "past the onset, where it is known" if labels == "onset" else "anywhere in it"
