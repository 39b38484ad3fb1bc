"""The verb `chat`: a guarded conversation on the terminal, or line by line from a pipe."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from redflag.bounds import option
from redflag.errors import RedflagError
from redflag.guard.options import PolicyOptions
from redflag.models.named import DEFAULT
from redflag.terminal.paint import DIM, legend, style, wants_colour
from redflag.terminal.screen import TerminalOptions, respond

if TYPE_CHECKING:
    from redflag.guard.guard import Guard

PROMPT = "> "
HELP = """\
/reset         forget the conversation
/system TEXT   give a system message; without a text, take it away
/policy        show thresholds and actions
/quit          leave; so does the end of the input
//...          say a line that begins with /
Ctrl-C stops an answer."""


@dataclass(kw_only=True)
class ChatArguments(TerminalOptions):
    """Options of `redflag chat`."""

    model: str = option(DEFAULT, "Output folder of `redflag train`; default: the flag that ships, with its base.")


ARGUMENTS = (ChatArguments, PolicyOptions)
POSITIONAL = None


def run(arguments: ChatArguments, options: PolicyOptions | None = None) -> int:
    """Talks until the input ends: answers to standard output, everything about them to standard error.

    Returns:
        0, or 1 if an answer could not be judged.
    """
    arguments.sampling()  # invalid options are refused before the model is loaded
    guard = arguments.guard(options if options is not None else PolicyOptions())
    chat = Chat(guard, arguments)
    if sys.stdin.isatty():
        _tell(HELP)
    if wants_colour(arguments.color):
        print(legend(), file=sys.stderr)
    for line in lines():
        try:
            if not chat.say(line):
                break
        except KeyboardInterrupt:  # between answers
            _tell("")
    return 1 if chat.faults else 0


class Chat:
    """A conversation of requests and shown answers.

    Of a halted answer the released part and the replacement stay in it; an exchange whose answer showed nothing is
    dropped, so that the model does not see a request without an answer.

    Attributes:
        messages: The conversation, without the system message.
        faults: Number of answers that could not be judged.
    """

    def __init__(self, guard: Guard, options: TerminalOptions) -> None:
        self.messages: list[dict[str, str]] = []
        self.system = options.system
        self.faults = 0
        self._guard = guard
        self._options = options

    def say(self, line: str) -> bool:
        """Executes a command, or answers the user's text. False ends the conversation."""
        text = line.strip()
        if not text:
            return True
        if text.startswith("/") and not text.startswith("//"):
            command, _, rest = text.partition(" ")
            if command == "/quit":
                return False
            self._execute(command, rest.strip())
        else:
            self._answer(text[1:] if text.startswith("//") else text)
        return True

    def _execute(self, command: str, text: str) -> None:
        if command == "/reset":
            self.messages = []
            _tell("the conversation is empty")
        elif command == "/system":
            self.system = text or None
            _tell("the system message is set" if text else "there is no system message")
        elif command == "/policy":
            _tell("\n".join(describe(self._guard)))
        else:
            _tell(HELP if command == "/help" else f"{command} is no command\n{HELP}")

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            answer = respond(self._guard, [*system, *messages], self._options.sampling(), self._options)
        except RedflagError as error:  # Only this turn cannot be answered.
            _tell(f"redflag chat: {' '.join(str(error).split())}")
            self.faults += 1
            return
        self.faults += answer.trace.facts().end == "fault"
        if answer.text.strip():
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        else:
            _tell("nothing was shown, so this exchange is forgotten")


def describe(guard: Guard) -> list[str]:
    """Lines on thresholds and actions, release, and the consequences of alarms."""
    policy = guard.policy
    lines = [
        f"{name}: threshold {value:.4g}, action {policy.decide(name)}"
        for name, value in guard.thresholds.values.items()
    ]
    lines.append(f"release: {policy.release}, hold_back {policy.hold_back}" + (", observe" if policy.observe else ""))
    if policy.intervenes:
        lines.append(
            f"a confirmed alarm leads to {policy.confirmed}; at most {policy.max_interventions} interventions and "
            f"{policy.max_wait_tokens} hidden tokens"
        )
    if guard.judge is not None:
        lines.append(f"second judge: {type(guard.judge).__name__}, {policy.judge_timeout:g} s")
    if policy.replacement:
        shown = policy.replacement if isinstance(policy.replacement, str) else "made by a function"
        lines.append(f"replacement: {shown}")
    return lines


def lines() -> Iterator[str]:
    """The user's lines, or those of a pipe. Ctrl-C at the prompt starts a new line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # invalid bytes in a pipe must not end the conversation
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # line editing and history, if the system has them
        import readline  # noqa: F401
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            _tell("")
            return
        except KeyboardInterrupt:
            _tell("")


def _tell(text: str) -> None:
    print(style(DIM, text, bool(text) and wants_colour("auto", sys.stderr)), file=sys.stderr)
