"""From a constitution to rows, one step after the other."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.judges import Judge, UnansweredError
from redflag.lab.synthesis.augment import with_typos, wrapped
from redflag.lab.synthesis.constitution import ANSWERS, Constitution
from redflag.lab.synthesis.dedup import distinct, normalised
from redflag.lab.synthesis.onset import Search, ask, find_onsets, with_onsets
from redflag.lab.synthesis.quality import bad_answer, bad_request, usable
from redflag.lab.synthesis.questions import KeptAnswers, Question
from redflag.lab.synthesis.requests import Request, find_requests
from redflag.lab.synthesis.wording import answer_question, paraphrase_question, translate_question

OnProgress = Callable[[str, int, int], None]

_BLOCK = 16  # requests that are answered at one temperature, so that a local model can answer them side by side
_SEEDS = 1_000_000  # of one answer round
_FOUND = {None: "no verdict", True: "harmful in a harmless class", False: "harmless in a harmful class"}


@dataclass(frozen=True)
class Settings:
    """Counts and sampling settings.

    Attributes:
        requests: Number of requests of all classes together, before filtering.
        answers: Number of answers per request.
        temperatures: Used in turn.
        max_tokens: Maximum number of tokens of an answer.
        paraphrases: Number of paraphrases per request, with the same answer.
        languages: Languages into which every exchange is translated.
        wrapped: Share of exchanges that are repeated with the request in a jailbreak wrapper.
        typos: Share of exchanges that are repeated with typing errors in the request.
        near: Similarity from which texts count as equal.
        shortest: Minimum length of an answer, characters.
        longest: Maximum length of an answer, characters.
        search: Search for onsets, `first` or `bisect`.
        lang: Language of the constitution.
        workers: Threads that ask the judge.
    """

    requests: int = 100
    answers: int = 1
    temperatures: tuple[float, ...] = (0.7, 1.0)
    max_tokens: int = 512
    paraphrases: int = 0
    languages: tuple[str, ...] = ()
    wrapped: float = 0.0
    typos: float = 0.0
    near: float = 0.8
    shortest: int = 8
    longest: int = 20_000
    search: Search = "first"
    lang: str = "en"
    seed: int = 0
    workers: int = 8

    def __post_init__(self) -> None:
        checks = (
            ("requests", self.requests, self.requests >= 1, "1 or more"),
            ("answers", self.answers, self.answers >= 1, "1 or more"),
            (
                "temperatures",
                self.temperatures,
                bool(self.temperatures) and all(math.isfinite(t) and t >= 0 for t in self.temperatures),
                "a list of numbers from 0",
            ),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("paraphrases", self.paraphrases, self.paraphrases >= 0, "0 or more"),
            ("wrapped", self.wrapped, 0.0 <= self.wrapped <= 1.0, "a share from 0 to 1"),
            ("typos", self.typos, 0.0 <= self.typos <= 1.0, "a share from 0 to 1"),
            ("near", self.near, 0.0 < self.near <= 1.0, "above 0 and at most 1"),
            ("workers", self.workers, self.workers >= 1, "1 or more"),
        )
        for name, value, valid, rule in checks:
            if not valid:
                raise RedflagError(f"{name} must be {rule} (got {value!r}).")


@dataclass(frozen=True)
class Synthesized:
    """What came of it.

    Attributes:
        rows: The rows, class by class; augmented ones last.
        dropped: Reason -> number of requests, answers and rows left out.
        without_onset: Harmful rows for which no onset could be found.
    """

    rows: list[Row]
    dropped: Counter[str] = field(default_factory=Counter)
    without_onset: int = 0


def synthesize(
    constitution: Constitution,
    model: KeptAnswers,
    judge: Judge | None,
    settings: Settings = Settings(),
    on_progress: OnProgress = lambda what, done, total: None,
) -> Synthesized:
    """Makes rows.

    Args:
        constitution: What is harmful and what is not.
        model: Who writes; with what it has written before.
        judge: Checks that answers belong to their side, and finds onsets. None: neither is done, and harmful rows have
            no onset, which means that they count as harmful from the first character.
        settings: How many of what.
        on_progress: Callback that gets the step, how many are done, and of how many.

    Raises:
        RedflagError: The model cannot be asked any further, or nothing was left.
    """
    dropped: Counter[str] = Counter()
    requests = find_requests(
        constitution,
        model,
        settings.requests,
        temperatures=settings.temperatures,
        near=settings.near,
        seed=settings.seed,
        dropped=dropped,
        on_progress=lambda done, total: on_progress("requests", done, total),
    )
    rows = _answered(constitution, requests, model, settings, dropped, on_progress)
    rows = _checked(rows, judge, settings, dropped, on_progress)
    rows = _distinct(rows, constitution, settings, dropped)
    rows = _with_onsets(rows, judge, settings, on_progress)
    more = [
        *_paraphrased(rows, model, settings, dropped, on_progress),
        *_disguised(rows, constitution, settings),
        *_with_onsets(
            _checked(_translated(rows, model, settings, dropped, on_progress), judge, settings, dropped, on_progress),
            judge,
            settings,
            on_progress,
        ),
    ]
    rows = _once([*rows, *more], dropped)
    if not rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common(3))
        raise RedflagError(f"no row is left ({reasons or 'there was no request'}): look at what the model answers")
    return Synthesized(rows, +dropped, sum(row.harmful and row.onset is None for row in rows))


def is_held_out(row: Row, share: float) -> bool:
    """Whether a row is held out for calibration: by its group's hash, so that no group is split."""
    digest = hashlib.sha256(f"held out {row.group}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def _answered(
    constitution: Constitution,
    requests: Sequence[Request],
    model: KeptAnswers,
    settings: Settings,
    dropped: Counter[str],
    on_progress: OnProgress,
) -> list[Row]:
    classes = {kind.name: number for number, kind in enumerate(constitution.classes)}
    spots = [(request, again) for again in range(settings.answers) for request in requests]
    questions = []
    for request, again in spots:
        # Seeds do not depend on the number of requests, so cached answers stay valid if more are requested.
        seed = settings.seed + (again * len(classes) + classes[request.kind.name]) * _SEEDS + request.number
        temperature = settings.temperatures[(again + request.number // _BLOCK) % len(settings.temperatures)]
        turns = answer_question(request.kind, request.text)
        questions.append(Question(turns, temperature, settings.max_tokens, seed))
    replies = model.ask(questions, lambda done, total: on_progress("answers", done, total))
    rows = []
    for (request, again), reply in zip(spots, replies, strict=True):
        kind, text = request.kind, usable(reply)
        reason = "not taken by the server" if reply.finish == "refused" else None
        reason = reason or bad_answer(text, kind, settings.shortest, settings.longest)
        if reason:
            dropped[f"answer: {reason}"] += 1
            continue
        rows.append(
            Row(
                [{"role": "user", "content": request.text}, {"role": "assistant", "content": text}],
                category=kind.category,
                group=request.group,
                source=f"{constitution.name}: {kind.name}",
                id=f"{constitution.name}-{kind.name}-{request.number}-{again}",
                lang=settings.lang,
            )
        )
    return rows


def _checked(
    rows: Sequence[Row], judge: Judge | None, settings: Settings, dropped: Counter[str], on_progress: OnProgress
) -> list[Row]:
    """The rows whose verdict agrees with their class."""
    if judge is None or not rows:
        return list(rows)

    def verdict(row: Row) -> bool | None:
        try:
            return ask(judge, row.messages[:-1], row.response).harmful
        except UnansweredError:
            return None

    kept = []
    with ThreadPoolExecutor(settings.workers) as pool:
        try:
            for number, (row, harmful) in enumerate(zip(rows, pool.map(verdict, rows), strict=True), 1):
                on_progress("checked", number, len(rows))
                if harmful == row.harmful:
                    kept.append(row)
                else:
                    dropped[f"judge: {_FOUND[harmful]}"] += 1
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return kept


def _distinct(rows: Sequence[Row], constitution: Constitution, settings: Settings, dropped: Counter[str]) -> list[Row]:
    """Drops answers nearly equal to an earlier one; of refusals, which are all similar, only equal rows."""
    refusing = {f"{constitution.name}: {kind.name}" for kind in constitution.classes if kind.answers == ANSWERS[1]}
    others = [row for row in rows if row.source not in refusing]
    kept = {id(others[i]) for i in distinct([row.response for row in others], settings.near)}
    left = [row for row in rows if row.source in refusing or id(row) in kept]
    dropped["answer: repeated"] += len(rows) - len(left)
    return left


def _with_onsets(rows: Sequence[Row], judge: Judge | None, settings: Settings, on_progress: OnProgress) -> list[Row]:
    harmful = [row for row in rows if row.harmful]
    if judge is None or not harmful:
        return list(rows)
    found = find_onsets(
        judge,
        harmful,
        search=settings.search,
        workers=settings.workers,
        on_progress=lambda done, total: on_progress("onsets", done, total),
    )
    labelled = iter(with_onsets(harmful, found))
    return [next(labelled) if row.harmful else row for row in rows]


def _paraphrased(
    rows: Sequence[Row], model: KeptAnswers, settings: Settings, dropped: Counter[str], on_progress: OnProgress
) -> list[Row]:
    spots = [(row, again) for row in rows for again in range(settings.paraphrases)]
    questions = [
        Question(paraphrase_question(_request(row)), 1.0, settings.max_tokens, settings.seed + again)
        for row, again in spots
    ]
    replies = model.ask(questions, lambda done, total: on_progress("paraphrases", done, total)) if questions else []
    found = []
    for (row, again), reply in zip(spots, replies, strict=True):
        text = reply.text.strip()
        if reason := bad_request(text) or ("cut off" if reply.finish == "length" else None):
            dropped[f"paraphrase: {reason}"] += 1
        else:
            found.append(_asked(row, text, f"p{again}"))
    return found


def _disguised(rows: Sequence[Row], constitution: Constitution, settings: Settings) -> list[Row]:
    found = []
    for row in rows:
        rng = random.Random(f"{settings.seed} {row.id}")
        if rng.random() < settings.wrapped:
            found.append(_asked(row, wrapped(_request(row), rng, constitution.wrappers), "w"))
        if rng.random() < settings.typos:
            found.append(_asked(row, with_typos(_request(row), rng), "t"))
    return found


def _translated(
    rows: Sequence[Row], model: KeptAnswers, settings: Settings, dropped: Counter[str], on_progress: OnProgress
) -> list[Row]:
    spots = [(row, language) for language in settings.languages for row in rows]
    most = 2 * settings.max_tokens
    questions = [
        Question(translate_question(text, language), 0.0, most, settings.seed)
        for row, language in spots
        for text in (_request(row), row.response)
    ]
    replies = model.ask(questions, lambda done, total: on_progress("translations", done, total)) if questions else []
    found = []
    for i, (row, language) in enumerate(spots):
        request, answer = replies[2 * i], replies[2 * i + 1]
        if "length" in (request.finish, answer.finish) or not request.text.strip() or not answer.text.strip():
            dropped["translation: cut off or empty"] += 1
            continue
        moved = _asked(row, request.text.strip(), language)
        turns = [*moved.messages[:-1], {"role": "assistant", "content": answer.text.strip()}]
        found.append(replace(moved, messages=turns, lang=language, onset=None, onset_source=None))
    return found


def _once(rows: Sequence[Row], dropped: Counter[str]) -> list[Row]:
    """Each exchange once; case and punctuation do not count."""
    seen: dict[tuple[str, str], Row] = {}
    for row in rows:
        seen.setdefault((normalised(_request(row)), normalised(row.response)), row)
    dropped["row: repeated"] += len(rows) - len(seen)
    return list(seen.values())


def _request(row: Row) -> str:
    return row.messages[-2]["content"]


def _asked(row: Row, text: str, mark: str) -> Row:
    """The row with another request."""
    return replace(row, messages=[{"role": "user", "content": text}, row.messages[-1]], id=f"{row.id}-{mark}")
