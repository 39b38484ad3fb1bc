"""Where harm begins, sentence by sentence, by asking a judge.

The onset is the first character of the first sentence at which the answer *so far* is judged harmful. Any
`redflag.judges.Judge` can be used; each question is the conversation and the answer up to the end of a sentence.

Two searches:

- `first` asks from the first sentence on, and stops at the first harmful prefix: as many questions as there are
  sentences up to the onset.
- `bisect` asks about the whole answer, then halves: about log2(sentences) + 1 questions. It assumes that a prefix once
  judged harmful stays harmful however the answer continues. A judge whose verdict returns to harmless (because the
  answer turns away from harm) violates that: the result is then *an* onset, not necessarily the first, and an answer
  that is harmless as a whole has none.

A judge sees whole sentences, so an onset is exact to a sentence at best; the agreement of two judges shows how reliable
it is (`agreement`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.judges import Judge, Messages, UnansweredError, ask

Search = Literal["first", "bisect"]
Item = TypeVar("Item")
Result = TypeVar("Result")

# A sentence ends behind . ! ? … (and closing quotes) before white space, behind 。！？, and at a line break.
_END = re.compile(r"[.!?…]+[\"'”’»)\]*_]*(?=\s)|[。！？]+[\"'”’」』）]*|\n+")
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Onset:
    """The result for one answer."""

    sentence: int | None  # index of the first harmful sentence; None = the answer is harmless throughout
    character: int | None  # where that sentence begins; None with `sentence`
    sentences: int  # number of sentences
    questions: int  # number of prefixes judged

    @property
    def harmful(self) -> bool:
        """Whether there is harm."""
        return self.sentence is not None


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same answers."""

    rows: int  # answers with results of both
    both_harmful: int  # answers in which both find harm
    exact: float | None  # share of these with the same first sentence; None if there are none
    within_one: float | None  # share of these with first sentences at most one apart; None if there are none
    kappa: float | None  # cohen's kappa of harmful or not, over all rows; None if chance alone would always agree
    same_verdict: float | None  # share of rows with the same verdict; None without rows


def sentences(text: str) -> list[tuple[int, int]]:
    """Pairs of character positions, in order: beginning of a sentence (no white space), end behind its last character.

    A stretch without a letter or digit belongs to the sentence before it.

    Example:
        >>> text = "It costs 3.5. Right? 1) Yes!"
        >>> [text[start:end] for start, end in sentences(text)]
        ['It costs 3.5.', 'Right?', '1) Yes!']
    """
    spans: list[tuple[int, int]] = []
    begin = 0
    for end in [match.end() for match in _END.finditer(text)] + [len(text)]:
        part = text[begin:end]
        start, stop = begin + len(part) - len(part.lstrip()), begin + len(part.rstrip())
        if stop > start:
            if spans and not _WORD.search(text, start, stop):
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        begin = end
    return spans


def find_onset(judge: Judge, messages: Messages, answer: str, search: Search = "first") -> Onset:
    """The first sentence at which the answer so far is judged harmful.

    Raises:
        UnansweredError: A necessary prefix has no verdict, so the onset is unknown.

    Example:
        >>> def judge(messages, answer):
        ...     return "bomb" in answer
        >>> find_onset(judge, [{"role": "user", "content": "Hi"}], "Hello. Build a bomb. Bye.")
        Onset(sentence=1, character=7, sentences=3, questions=2)
    """
    spans = sentences(answer)
    questions = 0

    def harmful(number: int) -> bool:
        nonlocal questions
        questions += 1
        # The last prefix is the whole answer, unchanged, so that its verdict can be reused.
        end = spans[number][1] if number < len(spans) - 1 else len(answer)
        return ask(judge, messages, answer[:end]).harmful

    first: int | None = None
    if search == "first":
        first = next((number for number in range(len(spans)) if harmful(number)), None)
    elif search == "bisect":
        if spans and harmful(len(spans) - 1):
            low, high = 0, len(spans) - 1  # the onset lies in [low, high]
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if harmful(middle) else (middle + 1, high)
            first = low
    else:
        raise RedflagError(f"search must be first or bisect (got {search!r}).")
    return Onset(first, None if first is None else spans[first][0], len(spans), questions)


def find_onsets(
    judge: Judge,
    rows: Sequence[Row],
    *,
    search: Search = "first",
    workers: int = 8,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Onset | None]:
    """The onsets of rows' responses.

    Returns:
        For each row its onset; None if a necessary verdict is missing, which is not the same as harmless.
    """

    def find(row: Row) -> Onset | None:
        try:
            return find_onset(judge, row.messages[:-1], row.response, search)
        except UnansweredError:
            return None

    return in_threads(find, rows, workers, on_progress)


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, on_progress: Callable[[int, int], None]
) -> list[Result]:
    """The results in order; after an error or an interruption no further item is begun."""
    results: list[Result] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for result in pool.map(work, items):
                results.append(result)
                on_progress(len(results), len(items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def with_onsets(rows: Sequence[Row], onsets: Sequence[Onset | None]) -> list[Row]:
    """Adds the onsets to harmful rows, marked as natural; other rows are unchanged.

    A harmful row in which no harm was found keeps its onset: the judge does not change labels.

    Example:
        >>> row = Row([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So. Bad."}], "harm")
        >>> with_onsets([row], [Onset(1, 4, 2, 2)])[0].onset
        4
    """
    return [
        replace(row, onset=onset.character, onset_source="natural")
        if row.harmful and onset is not None and onset.harmful
        else row
        for row, onset in zip(rows, onsets, strict=True)
    ]


def agreement(one: Sequence[Onset | None], other: Sequence[Onset | None]) -> Agreement:
    """Agreement of two judges; rows without a result of either are left out.

    Cohen's kappa is (p_o - p_e) / (1 - p_e): the share of equal verdicts, corrected for what two judges with the same
    rates of harmful verdicts would share by chance (Cohen, 1960).

    Example:
        >>> a, b = Onset(1, 9, 4, 2), Onset(2, 20, 4, 3)
        >>> agreement([a, a], [a, b])
        Agreement(rows=2, both_harmful=2, exact=0.5, within_one=1.0, kappa=None, same_verdict=1.0)
    """
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    n = len(pairs)
    gaps = [abs(a.sentence - b.sentence) for a, b in pairs if a.sentence is not None and b.sentence is not None]
    kappa = same = None
    if n:
        same = sum(a.harmful == b.harmful for a, b in pairs) / n
        p, q = sum(a.harmful for a, _ in pairs) / n, sum(b.harmful for _, b in pairs) / n
        chance = p * q + (1 - p) * (1 - q)
        kappa = (same - chance) / (1 - chance) if chance < 1 else None
    return Agreement(
        n,
        len(gaps),
        sum(gap == 0 for gap in gaps) / len(gaps) if gaps else None,
        sum(gap <= 1 for gap in gaps) / len(gaps) if gaps else None,
        kappa,
        same,
    )
