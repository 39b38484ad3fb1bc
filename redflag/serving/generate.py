"""The verb `generate`: one guarded response on the terminal, the flag probability as colour behind the text."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from redflag.backends import Sampling
from redflag.corpus.paint import RESET, legend, printable, span, wants_colour
from redflag.errors import RedflagError
from redflag.trace import Alarm, Done, Event, Halt, Text, Trace, write_traces
from redflag.watching.policy import Policy


@dataclass
class GenerateArguments:
    """What `redflag generate` is told."""

    prompt: str = field(metadata={"help": "What the user says; - reads it from standard input."})
    model: str = field(metadata={"help": "Folder that `redflag train` wrote."})
    system: str | None = field(default=None, metadata={"help": "System message."})
    prefill: str | None = field(
        default=None, metadata={"help": "Beginning of the response, which the model continues."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most response tokens."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the most likely token each time."})
    top_p: float = field(default=1.0, metadata={"help": "Keep the likeliest tokens with this much probability."})
    top_k: int = field(default=0, metadata={"help": "Keep this many of the likeliest tokens; 0 keeps all."})
    seed: int | None = field(default=None, metadata={"help": "Makes the draws reproducible."})
    hold_back: int = field(default=0, metadata={"help": "Tokens that wait until so many more have been judged."})
    observe: bool = field(default=False, metadata={"help": "Report alarms and let the response go on."})
    threshold: float | None = field(
        default=None, metadata={"help": "One threshold for all categories, in place of thresholds.json."}
    )
    record: str | None = field(default=None, metadata={"help": "Append the trace (numbers only) to this JSONL file."})
    color: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={"help": "Flag probability as background; auto: on a terminal, unless NO_COLOR is set."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:0, ..."})


ARGUMENTS = GenerateArguments
POSITIONAL = "prompt"


def run(arguments: GenerateArguments) -> int:
    """Streams one response: text to standard output, everything about it to standard error.

    Returns:
        0 when the response was completed or halted by an alarm, 1 when it could not be judged.

    Raises:
        RedflagError: The model, the prompt or an option cannot be used.
    """
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise RedflagError("The prompt is empty, so there is nothing to respond to; give a text, or - to read one.")
    messages = [{"role": "user", "content": prompt}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": arguments.system})
    if arguments.prefill is not None:
        messages.append({"role": "assistant", "content": arguments.prefill})
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    policy = Policy(hold_back=arguments.hold_back, observe=arguments.observe)

    if arguments.record is not None:
        write_traces(arguments.record, [], append=True)  # A record that cannot be kept is refused before it is made.

    from redflag.serving.guard import Guard

    guard = Guard.from_pretrained(
        arguments.model, policy=policy, thresholds=arguments.threshold, device=arguments.device
    )
    coloured = wants_colour(arguments.color)
    if coloured:
        print(legend(), file=sys.stderr)
    with guard.stream(messages, sampling) as stream:
        try:
            for piece in paint(stream, stream.trace, coloured):
                sys.stdout.write(piece)
                sys.stdout.flush()
        finally:
            # Also when interrupted: what was seen is kept, and the terminal gets its colours back.
            sys.stdout.write((RESET if coloured else "") + "\n")
            sys.stdout.flush()
            if arguments.record is not None:
                stream.trace.id = stream.trace.id or os.urandom(8).hex()
                write_traces(arguments.record, [stream.trace], append=True)
    for line in summary(stream.trace):
        print(line, file=sys.stderr)
    end = stream.trace.end
    return 1 if isinstance(end, Halt) and end.reason == "fault" else 0


def paint(events: Iterable[Event], trace: Trace, coloured: bool) -> Iterator[str]:
    """Released text, piece by piece, ready for a terminal.

    Args:
        events: The events of a stream, as they come.
        trace: The stream's trace, which grows with them.
        coloured: Put the highest flag probability of each piece behind it as a background.
    """
    for event in events:
        if isinstance(event, Text) and event.text:
            text = printable(event.text)
            judged = trace.flag_probs[event.position : event.position + len(event.token_ids)]
            yield span(text, max((max(probs) for probs in judged), default=0.0)) if coloured else text
        elif isinstance(event, Halt) and coloured:
            yield f"{RESET}\x1b[1;7m[halted: {event.category or event.reason}]"
        elif isinstance(event, Alarm) and coloured and event.action == "continue":
            yield f"{RESET}\x1b[7m[alarm: {event.category}]{RESET}"


def summary(trace: Trace) -> list[str]:
    """How it ended, in lines for the operator: alarms, the end, the highest probability of each flag."""
    lines = [
        f"alarm: {event.category} at token {event.position}, score {event.score:.4g} >= threshold "
        f"{event.threshold:.4g}, action {event.action}"
        for event in trace.events
        if isinstance(event, Alarm)
    ]
    end = trace.end
    if isinstance(end, Halt):
        dropped = len(trace.token_ids) - end.position
        why = f"alarm {end.category}" if end.reason == "alarm" else f"fault, {end.detail}"
        lines.append(f"halted: {why}; {end.position} tokens shown, {dropped} dropped")
    elif isinstance(end, Done):
        lines.append(f"done: {end.reason}; {end.position} tokens")
    if trace.flag_probs:
        peaks = (_peak(column) for column in zip(*trace.flag_probs, strict=True))
        lines.append(
            "highest p(flag): "
            + ", ".join(
                f"{name} {value:.4g} at token {position}"
                for name, (value, position) in zip(trace.categories, peaks, strict=True)
            )
        )
    return lines


def _peak(values: Sequence[float]) -> tuple[float, int]:
    key: Callable[[int], float] = values.__getitem__
    position = max(range(len(values)), key=key)
    return values[position], position
