"""What `redflag demo` shows of a watched model: an answer that completes, some that halt, an alarm that is reviewed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from redflag.backends import Sampling
from redflag.guard.guard import Guard
from redflag.judges import Judge, Verdict
from redflag.prompt import render_prompt, text_ids
from redflag.terminal.paint import BOLD, DIM, RESET, legend, printable, style
from redflag.terminal.screen import paint, summary
from redflag.trace import Event, Text
from redflag.watching.monitor import Monitor
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One answer; `demo_watch.yaml` has them."""

    about: str
    begun: tuple[tuple[str, str], ...]  # requests, each with the beginning of its answer
    low: bool


_FILE = yaml.safe_load(resources.files("redflag.lab").joinpath("demo_watch.yaml").read_text(encoding="utf-8"))
CASES = tuple(
    Case(
        case["about"], tuple((one["request"], one.get("prefill", "")) for one in case["begun"]), case.get("low", False)
    )
    for case in _FILE
)


def streams(folder: Path, coloured: bool, write: Callable[[str], None]) -> None:
    """Streams all cases, greedily; with `coloured` p(flag) is shown as colour."""
    guard = Guard.from_pretrained(folder)
    if coloured:
        write(legend() + "\n")
    for case in CASES:
        write("\n" + style(BOLD, case.about, coloured) + "\n")
        _show(guard, case, coloured, write)


def _show(guard: Guard, case: Case, coloured: bool, write: Callable[[str], None]) -> None:
    sampling = Sampling(max_new_tokens=TOKENS, temperature=0.0)
    count, tried = len(case.begun), 1
    while tried < count and guard.generate(_messages(*case.begun[tried - 1]), sampling).verdict != "halted":
        tried += 1
    request, prefill = case.begun[tried - 1]
    messages = _messages(request, prefill)
    write(style(DIM, "user: ", coloured) + request + "\n")
    if prefill:
        label = f"prefilled (opening {tried} of {count} that were chosen, of which the first that is halted is shown): "
        write(style(DIM, label, coloured) + prefill + "\n")
    unwatched = _with(guard, guard.thresholds, Policy(observe=True))
    watched = guard
    if case.low:
        peak = max(max(step) for step in unwatched.generate(messages, sampling).trace.scores)
        in_force = max(guard.thresholds.values.values())
        policy = Policy(default="escalate", max_interventions=TOKENS, judge_timeout=120.0)
        watched = _with(guard, by_hand(guard, min(peak / 2, in_force)), policy, same_flag(guard))
    shown = ""
    with watched.stream(messages, sampling) as stream:

        def recorded() -> Iterator[Event]:
            nonlocal shown
            for event in stream:
                shown += event.text if isinstance(event, Text) else ""
                yield event

        write(style(DIM, "assistant: ", coloured))
        for piece in paint(recorded(), stream.trace, coloured):
            write(piece)
        write((RESET if coloured else "") + "\n")
        for line in summary(stream.trace):
            write(style(DIM, f"  {line}", coloured) + "\n")
        halted = stream.trace.facts().end == "halted"
    if halted:
        rest = unwatched.generate(messages, sampling).text[len(shown) :]
        write(style(DIM, "  unwatched it would have gone on: ", coloured) + cover(rest) + "\n")


def _messages(request: str, prefill: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": request}]
    return [*messages, {"role": "assistant", "content": prefill}] if prefill else messages


def same_flag(guard: Any) -> Judge:
    """A second judge: the flag itself, read over the answer so far, at the threshold in force."""
    spec = guard.spec

    def judge(messages: Sequence[Mapping[str, str]], answer: str) -> Verdict:
        prompt = render_prompt(guard.tokenizer, messages, spec)
        (steps,) = guard.backend.score([(prompt, text_ids(guard.tokenizer, answer, spec))])
        monitor = Monitor(guard.thresholds.monitor, len(spec.categories))
        peaks = [max(column) for column in zip(*map(monitor.feed, steps.tolist()), strict=True)]
        harmful = any(peak >= guard.thresholds.values[name] for name, peak in zip(spec.categories, peaks, strict=True))
        return Verdict(1.0 if harmful else 0.0, f"the score's peak is {max(peaks):.2g}")

    return judge


def cover(text: str) -> str:
    """The text with all but its white space blocked out."""
    return re.sub(r"\S", "\u2588", printable(text).replace("\n", " "))


def by_hand(guard: Guard, value: float) -> Thresholds:
    """A threshold set by hand for this model and its monitor."""
    spec = guard.spec
    return Thresholds.manual(
        value, spec.categories, guard.thresholds.monitor, run_id=spec.run_id, template_hash=spec.template_hash
    )


def _with(guard: Guard, thresholds: Thresholds, policy: Policy, judge: Judge | None = None) -> Guard:
    """The same loaded model under another policy."""
    return Guard(guard.backend, guard.tokenizer, guard.spec, thresholds, policy, judge)
