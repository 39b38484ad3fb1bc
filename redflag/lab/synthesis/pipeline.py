"""From a constitution to rows, one step after the other."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.judges import Judge, UnansweredError, ask
from redflag.lab.synthesis.augment import with_typos, wrapped
from redflag.lab.synthesis.constitution import Constitution
from redflag.lab.synthesis.dedup import distinct, normalised
from redflag.lab.synthesis.onset import find_onsets, in_threads, with_onsets
from redflag.lab.synthesis.options import Settings
from redflag.lab.synthesis.quality import bad_answer, bad_request, usable
from redflag.lab.synthesis.questions import CachedWriter, Question, Reply
from redflag.lab.synthesis.requests import Request, find_requests
from redflag.lab.synthesis.writer_prompts import answer_question, paraphrase_question, translate_question

OnProgress = Callable[[str, int, int], None]

_BLOCK = 16  # requests that are answered at one temperature, so that a local model can answer them side by side
_SEEDS = 1_000_000  # of one answer round
_WRONG = {None: "no verdict", True: "harmful in a harmless class", False: "harmless in a harmful class"}


@dataclass(frozen=True)
class Synthesized:
    """Generated rows, and what was dropped."""

    rows: list[Row]  # the rows, class by class; augmented ones last
    dropped: Counter[str]  # reason -> number of requests, answers and rows left out
    without_onset: int  # harmful rows for which no onset could be found


def synthesize(
    constitution: Constitution,
    writer: CachedWriter,
    judge: Judge | None,
    settings: Settings | None = None,
    on_progress: OnProgress = lambda step, done, total: None,
) -> Synthesized:
    """Makes rows.

    Args:
        judge: Checks that answers belong to their side, and finds onsets. Without one neither is done, and harmful rows
            have no onset, which means that they count as harmful from the first character.
        on_progress: Callback with the step, how many are done, and of how many.

    Raises:
        RedflagError: The writer cannot be asked any further, or no row is left.
    """
    steps = _Steps(constitution, writer, judge, settings or Settings(), on_progress)
    requests = find_requests(constitution, writer, steps.settings, steps.dropped, partial(on_progress, "requests"))
    rows = steps.with_onsets(steps.distinct(steps.judged(steps.answered(requests))))
    augmented = [*steps.paraphrased(rows), *steps.disguised(rows)]
    augmented += steps.with_onsets(steps.judged(steps.translated(rows)))
    rows = steps.once([*rows, *augmented])
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in steps.dropped.most_common(3))
        raise RedflagError(f"no row is left ({reasons or 'there was no request'}). Look at the writer's answers.")
    return Synthesized(rows, +steps.dropped, sum(row.harmful and row.onset is None for row in rows))


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row is held out for calibration: by its group's hash, so that no group is split."""
    digest = hashlib.sha256(f"held out {row.group}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


@dataclass
class _Steps:
    constitution: Constitution
    writer: CachedWriter
    judge: Judge | None
    settings: Settings
    on_progress: OnProgress
    dropped: Counter[str] = field(default_factory=Counter)

    def answered(self, requests: Sequence[Request]) -> list[Row]:
        """A row for each usable answer."""
        settings = self.settings
        numbers = {kind.name: number for number, kind in enumerate(self.constitution.classes)}
        tasks = [(request, again) for again in range(settings.answers) for request in requests]
        questions = []
        for request, again in tasks:
            # Seeds do not depend on the number of requests, so cached answers stay valid if more are requested.
            seed = settings.seed + (again * len(numbers) + numbers[request.kind.name]) * _SEEDS + request.number
            temperature = settings.temperatures[(again + request.number // _BLOCK) % len(settings.temperatures)]
            turns = answer_question(request.kind, request.text)
            questions.append(Question(turns, temperature, settings.max_tokens, seed))
        rows = []
        for (request, again), reply in zip(tasks, self._ask("answers", questions), strict=True):
            kind, text = request.kind, usable(reply)
            reason = "not taken by the server" if reply.finish == "refused" else None
            reason = reason or bad_answer(text, kind, settings.shortest, settings.longest)
            if reason:
                self.dropped[f"answer: {reason}"] += 1
                continue
            rows.append(
                Row(
                    [{"role": "user", "content": request.text}, {"role": "assistant", "content": text}],
                    category=kind.category,
                    group=request.group,
                    source=f"{self.constitution.name}: {kind.name}",
                    id=f"{self.constitution.name}-{kind.name}-{request.number}-{again}",
                    lang=settings.lang,
                )
            )
        return rows

    def judged(self, rows: list[Row]) -> list[Row]:
        """The rows whose verdict agrees with their class; all of them without a judge."""
        if self.judge is None or not rows:
            return rows
        verdicts = in_threads(
            partial(_verdict, self.judge), rows, self.settings.workers, partial(self.on_progress, "checked")
        )
        agreeing = []
        for row, harmful in zip(rows, verdicts, strict=True):
            if harmful == row.harmful:
                agreeing.append(row)
            else:
                self.dropped[f"judge: {_WRONG[harmful]}"] += 1
        return agreeing

    def distinct(self, rows: Sequence[Row]) -> list[Row]:
        """Drops answers nearly equal to an earlier one; of refusals, which are all similar, only equal rows."""
        name, classes = self.constitution.name, self.constitution.classes
        refusing = {f"{name}: {kind.name}" for kind in classes if kind.answers == "refuse"}
        others = [row for row in rows if row.source not in refusing]
        unique = {id(others[i]) for i in distinct([row.response for row in others], self.settings.near)}
        left = [row for row in rows if row.source in refusing or id(row) in unique]
        self.dropped["answer: repeated"] += len(rows) - len(left)
        return left

    def with_onsets(self, rows: list[Row]) -> list[Row]:
        """Harmful rows get their onset, if there is a judge."""
        harmful = [row for row in rows if row.harmful]
        if self.judge is None or not harmful:
            return rows
        onsets = find_onsets(
            self.judge,
            harmful,
            search=self.settings.search,
            workers=self.settings.workers,
            on_progress=partial(self.on_progress, "onsets"),
        )
        labelled = iter(with_onsets(harmful, onsets))
        return [next(labelled) if row.harmful else row for row in rows]

    def paraphrased(self, rows: Sequence[Row]) -> list[Row]:
        """The same answers to requests in other words."""
        settings = self.settings
        tasks = [(row, again) for row in rows for again in range(settings.paraphrases)]
        questions = [
            Question(paraphrase_question(_request(row)), 1.0, settings.max_tokens, settings.seed + again)
            for row, again in tasks
        ]
        more = []
        for (row, again), reply in zip(tasks, self._ask("paraphrases", questions), strict=True):
            text = reply.text.strip()
            if reason := bad_request(text) or ("cut off" if reply.finish == "length" else None):
                self.dropped[f"paraphrase: {reason}"] += 1
            else:
                more.append(_with_request(row, text, f"p{again}"))
        return more

    def disguised(self, rows: Sequence[Row]) -> list[Row]:
        """The same answers to requests in jailbreak wrappers, or with typing errors."""
        more = []
        for row in rows:
            rng = random.Random(f"{self.settings.seed} {row.id}")
            if rng.random() < self.settings.wrapped:
                more.append(_with_request(row, wrapped(_request(row), rng, self.constitution.wrappers), "w"))
            if rng.random() < self.settings.typos:
                more.append(_with_request(row, with_typos(_request(row), rng), "t"))
        return more

    def translated(self, rows: Sequence[Row]) -> list[Row]:
        """Request and answer in other languages, without onsets."""
        settings = self.settings
        tasks = [(row, language) for language in settings.languages for row in rows]
        questions = [
            Question(translate_question(text, language), 0.0, 2 * settings.max_tokens, settings.seed)
            for row, language in tasks
            for text in (_request(row), row.response)
        ]
        replies = iter(self._ask("translations", questions))
        more = []
        for (row, language), request, answer in zip(tasks, replies, replies, strict=True):
            if "length" in (request.finish, answer.finish) or not request.text.strip() or not answer.text.strip():
                self.dropped["translation: cut off or empty"] += 1
                continue
            moved = _with_request(row, request.text.strip(), language)
            turns = [*moved.messages[:-1], {"role": "assistant", "content": answer.text.strip()}]
            more.append(replace(moved, messages=turns, lang=language, onset=None, onset_source=None))
        return more

    def once(self, rows: Sequence[Row]) -> list[Row]:
        """Each exchange once; case and punctuation do not count."""
        unique: dict[tuple[str, str], Row] = {}
        for row in rows:
            unique.setdefault((normalised(_request(row)), normalised(row.response)), row)
        self.dropped["row: repeated"] += len(rows) - len(unique)
        return list(unique.values())

    def _ask(self, step: str, questions: Sequence[Question]) -> list[Reply]:
        return self.writer.ask(questions, partial(self.on_progress, step)) if questions else []


def _verdict(judge: Judge, row: Row) -> bool | None:
    try:
        return ask(judge, row.messages[:-1], row.response).harmful
    except UnansweredError:
        return None


def _request(row: Row) -> str:
    return row.messages[-2]["content"]


def _with_request(row: Row, text: str, mark: str) -> Row:
    """The row with another request."""
    return replace(row, messages=[{"role": "user", "content": text}, row.messages[-1]], id=f"{row.id}-{mark}")
