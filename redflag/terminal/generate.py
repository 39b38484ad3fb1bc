"""The verb `generate`: one guarded response on the terminal, the flag probability as colour behind the text."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from redflag.bounds import option
from redflag.errors import RedflagError
from redflag.guard.options import PolicyOptions
from redflag.terminal.paint import legend, wants_colour
from redflag.terminal.screen import TerminalOptions, respond


@dataclass(kw_only=True)
class GenerateArguments(TerminalOptions):
    """Options of `redflag generate`."""

    prompt: str = field(metadata={"help": "The user's message; - reads it from standard input."})
    prefill: str | None = option(None, "Beginning of the response, which the model continues.")


ARGUMENTS = (GenerateArguments, PolicyOptions)
POSITIONAL = "prompt"


def run(arguments: GenerateArguments, options: PolicyOptions | None = None) -> int:
    """Streams one response: text to standard output, everything about it to standard error.

    Returns:
        0 if the response was completed or halted by an alarm, 1 if it could not be judged.
    """
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise RedflagError("prompt must not be empty. Give a text, or - to read one from standard input.")
    messages = [{"role": "user", "content": prompt}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": arguments.system})
    if arguments.prefill is not None:
        messages.append({"role": "assistant", "content": arguments.prefill})
    sampling = arguments.sampling()
    guard = arguments.guard(options if options is not None else PolicyOptions())
    if wants_colour(arguments.color):
        print(legend(), file=sys.stderr)
    answer = respond(guard, messages, sampling, arguments)
    if answer.stopped:
        raise KeyboardInterrupt
    return 1 if answer.trace.facts().end == "fault" else 0
