"""How far a run is and what it leaves out, on stderr."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from redflag.data.rows import Rows
from redflag.data.summary import warnings_about
from redflag.scoring.scored import Scored


def cut_lines(cut: Mapping[str, int]) -> list[str]:
    """What to say of rows that were cut, by what was cut: `response` or `prompt`."""
    lines = {
        "response": "responses did not fit the context and were cut at its end (`truncated`)",
        "prompt": "prompts did not fit the context and lost their oldest turns (`prompt_truncated`)",
    }
    return [f"{cut[what]} {line}" for what, line in lines.items() if cut.get(what)]


def progress(items: Iterable[Scored], *, total: int, what: str) -> Iterator[Scored]:
    """Passes items on and says on stderr how far it is: in one changing line on a terminal, now and then elsewhere."""
    terminal = sys.stderr.isatty()
    start = said = time.monotonic()
    tokens = 0
    cut: Counter[str] = Counter()
    for number, item in enumerate(items, 1):
        tokens += len(item.token_ids)
        cut.update(response=item.truncated, prompt=item.prompt_truncated)
        now = time.monotonic()
        if number == total or now - said > (0.2 if terminal else 15.0):
            said = now
            line = f"{what} {number}/{total} rows, {tokens / max(now - start, 1e-9):,.0f} response tokens/s"
            end = "\n" if number == total or not terminal else ""
            print(f"\r{line}" if terminal else line, end=end, file=sys.stderr, flush=True)
        yield item
    for line in cut_lines(cut):
        print(line, file=sys.stderr)


def report_skipped(skipped: Sequence[Any]) -> None:
    """Names the rows left out on stderr: all of a few, the first of many."""
    for bad in skipped[:5]:
        print(f"skipped {bad}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"... and {len(skipped) - 5} more; {len(skipped)} rows skipped in all", file=sys.stderr)


def report_rows(rows: Rows) -> None:
    """Says on stderr which rows were left out, and what is doubtful about the labels of the others."""
    report_skipped(rows.skipped)
    for line in warnings_about(rows):
        print(line, file=sys.stderr)


def prompt_progress(items: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """Passes scored prompts on and says now and then how far it is."""
    start = said = time.monotonic()
    cut: Counter[str] = Counter()
    for number, item in enumerate(items, 1):
        cut.update(prompt=item["prompt_truncated"])
        now = time.monotonic()
        if number == total or now - said > 15.0:
            said = now
            rate = number / max(now - start, 1e-9)
            print(f"scored {number}/{total} prompts, {rate:,.0f}/s", file=sys.stderr, flush=True)
        yield item
    for line in cut_lines(cut):
        print(line, file=sys.stderr)


class Countdown:
    """Says on stderr how far a step is and how long it will take: in one changing line on a terminal, or now and then.

    A step of less than two seconds says nothing.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        """Begins.

        Args:
            what: What is done.
            total: Of `unit`s.
            unit: What is counted.
        """
        self._what, self._total, self._unit = what, total, unit
        self._terminal = sys.stderr.isatty()
        self._start = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        """Takes in how many are done."""
        now, ended = time.monotonic(), done >= self._total
        spent = now - self._start
        if not done or spent < 2.0 or not (ended or now - self._said > (0.2 if self._terminal else 15.0)):
            return
        self._said = now
        left = f"{spent:,.0f} s" if ended else f"{spent / done * (self._total - done):,.0f} s left"
        line = f"{self._what}: {done:,}/{self._total:,} {self._unit}, {left}"
        end = "\n" if ended or not self._terminal else ""
        # The line before may have been longer.
        print(f"\r{line}\033[K" if self._terminal else line, end=end, file=sys.stderr, flush=True)
