"""One guarded response on a terminal: released text with its flag probability as colour, and the outcome of alarms."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.cells import cell_len

from redflag.backends import Sampling
from redflag.bounds import option
from redflag.events import verdict
from redflag.guard.detokenize import Detokenizer
from redflag.guard.options import GuardOptions, PolicyOptions
from redflag.terminal.paint import DIM, RESET, printable, span, style, wants_colour
from redflag.trace import Alarm, Done, Escalation, Event, Halt, Reflection, Text, Thought, Trace, write_traces

if TYPE_CHECKING:
    from redflag.guard.guard import Guard

# The tokens of a `Text` event -> the text that each adds.
Split = Callable[[Text], Sequence[str]]


@dataclass(kw_only=True)
class TerminalOptions(GuardOptions):
    """Options of the model, of sampling and of the display."""

    system: str | None = option(None, "System message.")
    max_new_tokens: int = option(256, "Maximum number of response tokens.")
    temperature: float = option(1.0, "0 takes the most likely token each time.")
    top_p: float = option(1.0, "Keep the likeliest tokens with this much probability.")
    top_k: int = option(0, "Keep this many of the likeliest tokens; 0 keeps all.")
    seed: int | None = option(None, "Makes the draws reproducible.")
    show_reflections: bool = option(False, "Show the text of reflections.")
    record: str | None = option(None, "Append the trace (numbers only) to this JSONL file.")
    color: Literal["auto", "always", "never"] = option("auto", "Colours; auto: on a terminal, unless NO_COLOR is set.")

    def sampling(self) -> Sampling:
        """The options of sampling."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
        return Sampling(**{name: getattr(self, name) for name in names})

    def guard(self, options: PolicyOptions) -> Guard:
        """Opens the guarded model."""
        policy = options.policy()
        if self.record is not None:
            write_traces(self.record, [], append=True)  # refuses a file that cannot be written before the model loads
        return self.open_guard(policy, options.second_judge())


@dataclass
class Answer:
    """A response as shown: its text, with a replacement, and whether Ctrl-C ended it."""

    text: str
    trace: Trace
    stopped: bool


def respond(guard: Guard, messages: list[dict[str, str]], sampling: Sampling, options: TerminalOptions) -> Answer:
    """Streams one response: text to standard output, everything about it to standard error.

    Ctrl-C ends the response; its trace is recorded too.

    Raises:
        RedflagError: The conversation cannot be answered; nothing was shown.
    """
    coloured = wants_colour(options.color)
    shown: list[str] = []
    stopped = False
    with guard.stream(messages, sampling) as stream:
        screen = Screen(sys.stdout, live=coloured and sys.stdout.isatty())
        try:
            split = _splitter(guard.tokenizer) if coloured else None
            events = _copy_text(stream, shown)
            pieces = paint(events, stream.trace, coloured, split=split, reflections=options.show_reflections)
            with screen.counting(stream.trace):
                for piece in pieces:
                    screen.write(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:
            # Also after an error: the trace is recorded and the colours are reset, unless the conversation was refused.
            if stream.trace.events or stream.trace.token_ids:
                screen.write((RESET if coloured else "") + "\n")
                if options.record is not None:
                    stream.trace.id = stream.trace.id or os.urandom(8).hex()
                    write_traces(options.record, [stream.trace], append=True)
    for line in summary(stream.trace, reflections=options.show_reflections and not coloured):
        print(style(DIM, line, coloured and wants_colour(options.color, sys.stderr)), file=sys.stderr)
    return Answer("".join(shown), stream.trace, stopped)


def paint(
    events: Iterable[Event],
    trace: Trace,
    coloured: bool,
    *,
    split: Split | None = None,
    reflections: bool = False,
) -> Iterator[str]:
    """Released text for a terminal, piece by piece.

    Args:
        trace: The stream's trace, which grows with the events.
        coloured: Colour each piece by its highest flag probability, and mark alarms and thoughts. Otherwise only the
            answer's text is shown.
        split: Splits a text into its tokens' texts, to colour each.
        reflections: Show the text of reflections instead of its length.
    """
    open_line = False  # whether the cursor is not at the beginning of a line
    for event in events:
        piece = ""
        if isinstance(event, Text) and event.text:
            piece = _spans(event, trace, split) if coloured else printable(event.text)
        elif coloured and isinstance(event, Thought):
            piece = style(DIM, printable(event.text))
        elif isinstance(event, Halt):
            piece = _ending(event, coloured, open_line)
        elif coloured and isinstance(event, Alarm) and event.action == "continue":
            piece = f"{RESET}\x1b[7m[alarm: {printable(event.category)}]{RESET}"
        elif coloured and isinstance(event, Reflection | Escalation):
            piece = _review(event, reflections, open_line)
        elif coloured and (mark := event.mark()):
            piece = style(DIM, f"[{printable(mark)}]") + " "
        if piece:
            yield piece
            open_line = not piece.endswith("\n")


def summary(trace: Trace, *, reflections: bool = False) -> list[str]:
    """Lines for the operator: alarms and their outcome, the end, the flags' highest probability.

    With `reflections`, also the text of reflections.
    """
    lines = []
    facts = trace.facts()
    for event in facts.decisions:
        if isinstance(event, Alarm):
            lines.append(
                f"alarm: {event.category} at token {event.position}, score {event.score:.4g} >= threshold "
                f"{event.threshold:.4g}, action {event.action}"
            )
        elif description := event.describe():
            lines.append(description)
            if reflections and isinstance(event, Reflection):
                lines += [f"  | {line}" for line in printable(event.text).splitlines()]
    lines.append(_end_line(trace))
    if facts.waited:
        lines.append(f"waited for {facts.waited} hidden tokens")
    if trace.flag_probs:
        peaks = []
        for name, values in zip(trace.categories, zip(*trace.flag_probs, strict=True), strict=True):
            peaks.append(f"{name} {max(values):.4g} at token {values.index(max(values))}")
        lines.append("highest p(flag): " + ", ".join(peaks))
    return [printable(line) for line in lines]


class Screen:
    """Writes to a terminal; `live`: shows behind the text, if it fits the line, how many tokens are held."""

    def __init__(self, out: TextIO, live: bool) -> None:
        self._out = out
        self._live = live
        self._lock = threading.Lock()
        self._column = 0
        self._status = ""

    def write(self, text: str) -> None:
        """Writes text, whose only escape sequences are colours."""
        with self._lock:
            self._show("")
            self._out.write(text)
            self._out.flush()
            if self._live:
                self._column = _column(text, self._column)

    @contextmanager
    def counting(self, trace: Trace) -> Iterator[None]:
        """Shows how many tokens of a response are held while it is written."""
        if not self._live:
            yield
            return
        over = threading.Event()

        def count() -> None:
            while not over.wait(0.1):
                released = trace.released  # read first: the trace grows, and the count must not be negative
                held = len(trace.token_ids) - released
                with self._lock:
                    if not over.is_set():
                        self._show(f" [{held} held]" if held > 0 else "")

        ticker = threading.Thread(target=count, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            over.set()
            ticker.join()
            with self._lock:
                self._show("")

    def _show(self, status: str) -> None:
        if not self._live or status == self._status:
            return
        if self._column + len(status) >= shutil.get_terminal_size().columns:
            status = ""
        # Saving and restoring the cursor keeps it behind the text; the rest of the line is erased.
        self._out.write(f"\x1b[K\x1b7{style(DIM, status)}\x1b8" if status else "\x1b[K" if self._status else "")
        self._out.flush()
        self._status = status


def _copy_text(events: Iterable[Event], shown: list[str]) -> Iterator[Event]:
    for event in events:
        if isinstance(event, Text | Halt):
            shown.append(event.text)
        yield event


def _splitter(tokenizer: Any) -> Split:
    detokenizer = Detokenizer(tokenizer)
    return lambda event: [detokenizer.push(token_id) for token_id in event.token_ids]


def _spans(event: Text, trace: Trace, split: Split | None) -> str:
    probs = [max(step) for step in trace.flag_probs[event.position : event.position + len(event.token_ids)]]
    pieces = split(event) if split is not None else ()
    if "".join(pieces) != event.text:  # A prefill, a stop text or a flag's text was removed: one colour for all.
        return span(printable(event.text), max(probs, default=0.0))
    return "".join(span(printable(piece), p) for piece, p in zip(pieces, probs, strict=True))


def _review(event: Reflection | Escalation, reflections: bool, open_line: bool) -> str:
    if isinstance(event, Escalation):
        lines = [f"[second judge: {verdict(event)}]"]
    else:
        lines = [f"[reflection: {len(event.token_ids)} tokens, verdict {verdict(event)}]"]
        lines += [f"| {line}" for line in printable(event.text).splitlines()] if reflections else []
    return ("\n" if open_line else "") + "".join(style(DIM, line) + "\n" for line in lines)


def _ending(event: Halt, coloured: bool, open_line: bool) -> str:
    text = printable(event.text)
    if not coloured:
        return ("\n" if open_line else "") + text if text else ""
    why = printable(event.category or event.reason)
    return f"{RESET}\x1b[1;7m" + (f"[replaced: {why}]{RESET} {text}" if text else f"[halted: {why}]")


def _end_line(trace: Trace) -> str:
    end = trace.end
    if isinstance(end, Done):
        return f"done: {end.reason}; {end.position} tokens"
    if end is None:
        return f"stopped from here; {trace.released} tokens shown, {len(trace.token_ids) - trace.released} dropped"
    why = f"alarm {end.category}" if end.reason == "alarm" else f"fault, {end.detail}"
    line = f"halted: {why}; {end.position} tokens shown, {len(trace.token_ids) - end.position} dropped"
    if end.text:
        line += f", replaced by a text of {len(end.text)} characters"
    return line + (f" ({end.detail})" if end.detail and end.reason == "alarm" else "")


def _column(text: str, column: int) -> int:
    """The terminal column behind a text that starts in one; colours have no width."""
    width = max(1, shutil.get_terminal_size().columns)
    line = re.sub(r"\x1b\[[0-9;]*m", "", text)
    if "\n" in line:
        line, column = line.rpartition("\n")[2], 0
    first, *others = line.split("\t")
    column += cell_len(first)
    for piece in others:
        column = (column // 8 + 1) * 8 + cell_len(piece)
    return (column - 1) % width + 1 if column else 0
