"""Models trained to refuse, read as detectors: how much probability the refusal has.

`refusal_tokens` asks once, before the first token (refusal tokens, arXiv 2412.06748). `deep_alignment` refuses behind
harmful beginnings (arXiv 2406.05946), `refusal_everywhere` at every position of a harmful response (RTO, DeRTa,
arXiv 2407.09121); both are asked before every token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from redflag.data.rows import Row
from redflag.files import keep_json, kept_json
from redflag.flags import Flag, FlagSpec, attach
from redflag.lab.baselines import Cost
from redflag.lab.baselines.bench import Bench, Read, digest, model_stamp, score_pairs, thinned
from redflag.lab.baselines.tuning import IGNORE, Example, Tuning, fine_tune
from redflag.scoring.recording import Recording
from redflag.truncation import fit_prompt

Labels = Literal["onset", "response"]

# They begin alike, with a word that harmless text does not begin with: its probability is what is read.
REFUSALS = (
    "Sorry, I can't help with that.",
    "Sorry, but I won't assist with this request.",
    "Sorry, this could hurt somebody, so I will not go on.",
)
MARKS = FlagSpec((Flag("refuse", "[refuse]"), Flag("respond", "[respond]")))
_LONGEST = 100  # tokens of a harmful beginning, as in section 5b's source


@dataclass
class RefusalBaseline:
    """A base model trained to refuse, and the probability of that.

    Attributes:
        model: Folder of the trained model, an ordinary one that attacks can be run against.
        examples: (rows, draw, ids of the marks) -> training examples of one pass.
        watched: Ids whose probabilities, added up, are the score; empty: that of the mark [refuse].
        at_first: Whether only the first position is asked, its answer holding for the whole response.
        most_rows: Most training rows; None: all.
        tuning: How it is trained.
        first_step: Steps before this one are recorded as 0: what is refused there is the request, not the response.
    """

    name: str
    what: str
    bench: Bench
    model: Path
    examples: Callable[[Sequence[Read], random.Random, Sequence[int]], list[Example]]
    watched: tuple[int, ...]
    at_first: bool
    most_rows: int | None
    tuning: Tuning
    first_step: int = 0
    _backend: Any = None
    _seconds: float = 0.0
    _steps: int = 0

    def fit(self, train: Sequence[Row]) -> None:
        """Trains, or takes the model that an earlier run trained; see `Baseline.fit`."""
        from redflag.backends.load import read_model

        chosen = thinned(train, self.most_rows, self.bench.seed)
        key = digest(
            [
                [self.name, self.what, self.watched, asdict(self.tuning), self.bench.seed, self.bench.limit],
                [row.to_dict() for row in chosen],
                model_stamp(self.bench.base),
            ]
        )
        done = self.model / "trained.json"
        if kept := kept_json(done, fingerprint=key):
            model, _ = read_model(self.model, "auto")
            self.watched = tuple(kept["watched"])
        else:
            done.unlink(missing_ok=True)
            model, tokenizer = read_model(self.bench.base, "auto")
            marks = () if self.watched else attach(model, tokenizer, MARKS).ids
            self.watched = self.watched or marks[:1]
            reads = self.bench.read(chosen)
            model = fine_tune(
                model.to(self.bench.device),
                lambda number: self.examples(reads, random.Random(f"{self.bench.seed}/{number}"), marks),
                self.tuning,
                seed=self.bench.seed,
                new_rows=marks,
            )
            model.save_pretrained(self.model)
            tokenizer.save_pretrained(self.model)
            keep_json(done, {"fingerprint": key, "watched": self.watched})
        self._backend = self._watching(model.to(self.bench.device))

    def score(self, rows: Sequence[Row]) -> Recording:
        """Scores; see `Baseline.score`."""
        assert self._backend is not None, "fit comes before score"
        reads = self.bench.read(rows)
        # Asked once, a response needs no token to be run.
        pairs = [(read.prompt_ids, read.judged_ids[:1] if self.at_first else read.judged_ids) for read in reads]
        begun = time.perf_counter()
        probs = score_pairs(self._backend, pairs, self.bench.batch_size, f"scoring {self.name}")
        self._seconds += time.perf_counter() - begun
        self._steps += sum(len(read.judged_ids) for read in reads)
        totals = [np.minimum(one.sum(axis=1), 1.0).astype(np.float32) for one in probs]
        if self.at_first:
            totals = [np.repeat(one, len(read.judged_ids)) for one, read in zip(totals, reads, strict=True)]
        for one in totals:
            one[: self.first_step] = 0.0
        return self.bench.record(reads, totals, self.name)

    def cost(self) -> Cost:
        """Cost; see `Baseline.cost`."""
        when = "once per response" if self.at_first else "at every step"
        return Cost(
            microseconds_per_token=1e6 * self._seconds / self._steps if self._steps else None,
            flops_per_token=0.0,
            note=f"takes the place of the model: one probability of its own softmax is read {when}, nothing comes on "
            "top; the time is that of its own forward pass, batched, spread over the response's tokens",
        )

    def _watching(self, model: Any) -> Any:
        from redflag.backends.hf import HFBackend

        flags = tuple(Flag(f"refusal {i}", id=token) for i, token in enumerate(self.watched))
        return HFBackend(model, self.bench.tokenizer, FlagSpec(flags), reuse_prefix=False)


def refusal_tokens(
    bench: Bench,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    most_rows: int | None = None,
    tuning: Tuning | None = None,
) -> RefusalBaseline:
    """[refuse] or [respond] before every answer, plain fine-tuning on token and answer (arXiv 2412.06748).

    Harmful rows are answered by [refuse] and a refusal, harmless ones by [respond] and their response.
    """
    texts = [_ids(bench, text) for text in refusals]

    def examples(reads: Sequence[Read], draw: random.Random, marks: Sequence[int]) -> list[Example]:
        made = []
        for read in reads:
            if read.row.harmful:
                answer = [marks[0], *draw.choice(texts), *read.judged_ids[read.tokens :]]
            else:
                answer = [marks[1], *read.judged_ids]
            made.append(_example(bench, read, answer, [True] * len(answer)))
        return made

    what = (
        "Refusal tokens: the base model fine-tuned to begin with [refuse] and a refusal (harmful rows) or [respond] "
        f"and the response (harmless rows); p([refuse]) at position 0 holds for the whole response; {_on(most_rows)}"
    )
    return RefusalBaseline("refusal tokens", what, bench, folder, examples, (), True, most_rows, tuning or Tuning())


def deep_alignment(
    bench: Bench,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    labels: Labels = "onset",
    first_step: int = 1,
    most_rows: int | None = None,
    tuning: Tuning | None = None,
) -> RefusalBaseline:
    """Refusals, half of them behind the first tokens of a harmful response (arXiv 2406.05946).

    The loss is on the refusal alone; harmless rows, with their own responses, are the anchor. With `labels` "onset" a
    beginning reaches past the onset where that is known; "response" cuts anywhere, as published. At step 0 such a
    model refuses requests, harmless answers to which look no different yet: that step is not read.
    """
    texts = [_ids(bench, text) for text in refusals]

    def examples(reads: Sequence[Read], draw: random.Random, marks: Sequence[int]) -> list[Example]:
        made = []
        for read in reads:
            if not read.row.harmful:
                made.append(_example(bench, read, read.judged_ids, [True] * len(read.judged_ids)))
                continue
            made.append(_behind_harm(bench, read, draw, draw.choice(texts), labels))
        return made

    what = (
        "Deep alignment: the base model fine-tuned to refuse, half the time behind the first tokens of the harmful "
        f"response ({_cut(labels)}), with harmless rows as anchor; probability that a refusal begins, at every "
        f"step{_from(first_step)}; "
        f"{_on(most_rows)}"
    )
    return RefusalBaseline(
        "deep alignment", what, bench, folder, examples, _first(texts), False, most_rows, tuning or Tuning(), first_step
    )


def refusal_everywhere(
    bench: Bench,
    folder: Path,
    *,
    refusals: Sequence[str] = REFUSALS,
    labels: Labels = "onset",
    first_step: int = 1,
    most_rows: int | None = None,
    tuning: Tuning | None = None,
) -> RefusalBaseline:
    """DeRTa (arXiv 2407.09121): a refusal's first token asked for at every position of a harmful response.

    Each harmful row gives that, and by the toss of a coin a refusal behind its beginning, as `deep_alignment`. With
    `labels` "onset" the positions from a known onset on count; "response" takes all, as published.
    """
    texts = [_ids(bench, text) for text in refusals]
    first = texts[0][0]

    def examples(reads: Sequence[Read], draw: random.Random, marks: Sequence[int]) -> list[Example]:
        made = []
        for read in reads:
            if not read.row.harmful:
                made.append(_example(bench, read, read.judged_ids, [True] * len(read.judged_ids)))
            elif draw.random() < 0.5:
                made.append(_behind_harm(bench, read, draw, draw.choice(texts), labels))
            else:
                onset = min(read.onset or 0, len(read.judged_ids)) if labels == "onset" else 0
                targets = [IGNORE] * (len(read.prompt_ids) + onset) + [first] * (len(read.judged_ids) - onset)
                made.append(Example(read.prompt_ids + read.judged_ids, targets))
        return made

    what = (
        "Refusal at every position (RTO): the base model fine-tuned to begin a refusal at every position of a harmful "
        f"response ({_cut(labels)}) or behind its beginning, with harmless rows as anchor; probability that a refusal "
        f"begins, at every step{_from(first_step)}; {_on(most_rows)}"
    )
    return RefusalBaseline(
        "refusal at every position", what, bench, folder, examples, _first(texts), False, most_rows,
        tuning or Tuning(),
    )  # fmt: skip


def _behind_harm(bench: Bench, read: Read, draw: random.Random, refusal: list[int], labels: Labels) -> Example:
    """By the toss of a coin a plain refusal, or one behind 1 to 100 tokens of the harmful response."""
    refusal = [*refusal, *read.judged_ids[read.tokens :]]
    count = 0
    if draw.random() < 0.5:
        least = min((read.onset or 0) + 1, read.tokens) if labels == "onset" else 1
        count = draw.randint(least, max(least, min(_LONGEST, read.tokens)))
    answer = read.judged_ids[:count] + refusal
    return _example(bench, read, answer, [False] * count + [True] * len(refusal))


def _example(bench: Bench, read: Read, answer: list[int], asked: list[bool]) -> Example:
    """The answer behind the prompt, which is cut where both do not fit."""
    room, prompt = bench.limit, read.prompt_ids
    if room is not None:
        answer, asked = answer[: room - 1], asked[: room - 1]
        prompt = fit_prompt(bench.tokenizer, read.row.messages[:-1], bench.spec, room - len(answer), prompt)
    return Example(
        prompt + answer,
        [IGNORE] * len(prompt) + [token if one else IGNORE for token, one in zip(answer, asked, strict=True)],
    )


def _ids(bench: Bench, text: str) -> list[int]:
    return list(bench.tokenizer(text, add_special_tokens=False)["input_ids"])


def _first(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted({text[0] for text in texts}))


def _on(most_rows: int | None) -> str:
    if most_rows is None:
        return "trained on the same rows as the flag."
    return f"trained on at most {most_rows} of the flag's rows, drawn by seed."


def _cut(labels: Labels) -> str:
    return "past the onset, where it is known" if labels == "onset" else "anywhere in it"


def _from(first_step: int) -> str:
    return f" from step {first_step} on (before, the request is refused)" if first_step else ""
