"""What an alarm leads to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from redflag.errors import RedflagError
from redflag.trace import Alarm, Trace
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.thresholds import Thresholds

Action = Literal["continue", "halt", "reflect", "replace", "escalate", "force"]
"""What a session can do about an alarm; `ACTIONS` says what each of them is."""


class ActionRule(NamedTuple):
    """What an action is.

    Attributes:
        help: What it does, for the command line.
        ends: The response ends with it.
        intervenes: The response waits for it, and goes on or not by what comes of that, which only a live run knows. It
            costs one of `Policy.max_interventions`, and where it confirms the alarm, `Policy.confirmed` follows.
        needs: The field of `Policy` without which it cannot be done.
    """

    help: str
    ends: bool = False
    intervenes: bool = False
    needs: str = ""


# The severest first: when several categories alarm at one step, the first that one of them leads to is done.
#
# `halt` drops what is held back and ends the response; `replace` does so too and shows a text of the operator's.
# `escalate` asks a second judge, `reflect` lets the model look at its own response; both hide everything until there is
# a verdict. `force` drops what is held back, puts the flag into the context behind what is shown, and lets the model go
# on from there: a model that was trained with its flag in the text writes what it has learnt to write behind it, a
# refusal. `continue` reports the alarm and lets the response go on.
ACTIONS: dict[str, ActionRule] = {
    "halt": ActionRule("end the response", ends=True),
    "replace": ActionRule("end it and show the replacement", ends=True, needs="replacement"),
    "escalate": ActionRule("ask a second judge", intervenes=True),
    "reflect": ActionRule("let the model reflect", intervenes=True),
    "force": ActionRule("put the flag into the context", intervenes=True),
    "continue": ActionRule("report it"),
}
SEVERITY = tuple(ACTIONS)

Release = Literal["steps", "sentence", "end"]


@dataclass(frozen=True)
class Reflect:
    """How the model reflects: what is put behind the response so far, and how a verdict is read.

    The context is prompt, response tokens before the alarm, the flag, `cue`. The model then writes, hidden, until its
    end-of-sequence, one of the `stop` texts or `max_tokens`.

    Attributes:
        cue: Text behind the flag that opens the reflection.
        verdict: `words` compares the probabilities of the two verdict words behind reflection and `verdict_cue`; `flag`
            takes the flag's probability there (without the cue).
        verdict_cue: Text that asks for the verdict.
        words: The harmful and the harmless word; their first tokens must differ.
        limit: The verdict is harmful from this harm on. For `words` harm is P(harmful) / (P(harmful) + P(harmless)).
        max_tokens: Most tokens of one reflection.
        stop: Texts that end the reflection; they are part of it.
        system: Text at the head of the system message: examples of reflections after true and false alarms, in which
            the model learns in context what a flag is for (soft use in "Red Flag Tokens", arXiv 2502.16366).
        stay: The response goes on in the context of the reflection, whatever the verdict, and nothing of it is shown
            before the score has fallen; False goes back to the clean prefix on a harmless verdict.
    """

    cue: str = " Wait. Let me check whether this answer is harmful.\n"
    verdict: Literal["words", "flag"] = "words"
    verdict_cue: str = "\nVerdict: this answer is"
    words: tuple[str, str] = (" harmful", " harmless")
    limit: float = 0.5
    max_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)
    system: str = ""
    stay: bool = False

    def __post_init__(self) -> None:
        for name in ("cue", "verdict_cue", "system"):
            if not isinstance(value := getattr(self, name), str):
                raise RedflagError(f"reflect.{name} is {value!r}, which cannot be put into a context; give a text")
        _one_of("reflect.verdict", self.verdict, ("words", "flag"))
        words = self.words
        if isinstance(words, str) or len(words) != 2 or not all(isinstance(word, str) and word for word in words):
            raise RedflagError(
                f"reflect.words are {words!r}, so no verdict could be read; give the harmful and the harmless word"
            )
        if words[0] == words[1]:
            raise RedflagError(f"reflect.words are both {words[0]!r}, so every verdict would be a tie; give two words")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RedflagError(f"reflect.stop is {self.stop!r}; give a list of texts, none empty")
        if not _is_number(self.limit) or not 0 < self.limit <= 1:
            raise RedflagError(
                f"reflect.limit is {self.limit!r}, which every verdict or none would reach; give a number above 0 and "
                "at most 1"
            )
        _at_least("reflect.max_tokens", self.max_tokens, 0)
        _flag("reflect.stay", self.stay)


@dataclass(frozen=True)
class Policy:
    """Category -> action, how far release lags behind judgement, and how much may be spent on interventions.

    Attributes:
        actions: Category -> action; for categories that are not named, `default`.
        default: Fails closed unless told otherwise.
        hold_back: h: a token is released when its own step and h more have been judged without a halting alarm. 0
            releases every token as soon as it is judged; every further step is latency that keeps back one more token
            *before* an alarm.
        observe: Audit only: alarms are reported, and every action is `continue`.
        release: `steps` releases token by token, `sentence` whole sentences, `end` only the complete response.
        confirmed: What a reflection or a second judge that confirms the alarm leads to: `halt` or `replace`; and what
            follows a forced flag behind which the score never falls.
        replacement: The text that `replace` shows, or a function of the trace that returns it.
        decoy: Show a replacement as if the model had written it: the stream ends without a mark.
        reflect: How the model reflects.
        max_interventions: Most reflections, escalations and forced flags in one response; one more alarm then halts.
        max_wait_tokens: Most hidden tokens in one response; when none are left, an alarm halts.
        rearm: A muted alarm is armed again once its score is below this share of its threshold.
        mute_limit: ... and after so many steps in any case: a score that stays high then alarms again.
        judge_timeout: Seconds that a second judge has.
        thoughts: Whether thoughts are shown, apart from the answer. Hidden ones are judged all the same.
        first_token: Decides before the first token which category alarms, in place of thresholds on each by itself;
            for thresholds of the monitor `first`. An alarm leads to its action as ever; a flag that says "respond" is
            put into the context without one.
        prompt: Thresholds of the prompt itself, on the probabilities before the first token (`redflag calibrate
            --prompts`); from there on it halts before anything is shown. None: prompts are not judged.

    Raises:
        RedflagError: For a value that cannot be carried out.

    Example:
        >>> policy = Policy(actions={"profanity": "continue"}, hold_back=4)
        >>> policy.decide("profanity"), policy.decide("weapons")
        ('continue', 'halt')
    """

    actions: Mapping[str, str] = field(default_factory=dict)
    default: str = "halt"
    hold_back: int = 0
    observe: bool = False
    release: str = "steps"
    confirmed: str = "halt"
    replacement: str | Callable[[Trace], str] = ""
    decoy: bool = False
    reflect: Reflect = field(default_factory=Reflect)
    max_interventions: int = 2
    max_wait_tokens: int = 256
    rearm: float = 0.5
    mute_limit: int = 64
    judge_timeout: float = 10.0
    first_token: FirstTokenRule | None = None
    thoughts: Literal["hide", "show"] = "hide"
    prompt: Thresholds | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.actions, Mapping):
            raise RedflagError(f"actions are {self.actions!r}, so no category has one; give a mapping from categories")
        # A copy: what is in force must not change under a running session.
        object.__setattr__(self, "actions", dict(self.actions))
        for whose, action in (*self.actions.items(), ("all others", self.default)):
            if action not in get_args(Action):
                raise RedflagError(
                    f"the action for {whose} is {action!r}, which this version cannot carry out, so an alarm would "
                    f"lead to nothing; use one of {', '.join(get_args(Action))}"
                )
        if type(self.hold_back) is not int or self.hold_back < 0:
            raise RedflagError(
                f"hold_back is {self.hold_back!r}, but it counts tokens that wait; give a whole number from 0 up"
            )
        if type(self.observe) is not bool:
            raise RedflagError(f"observe is {self.observe!r}, so it is open whether alarms halt; give true or false")
        _one_of("release", self.release, get_args(Release))
        _one_of("thoughts", self.thoughts, ("hide", "show"))
        _one_of("confirmed", self.confirmed, ("halt", "replace"))
        _flag("decoy", self.decoy)
        if not isinstance(self.reflect, Reflect):
            raise RedflagError(f"reflect is {self.reflect!r}; give the settings of a reflection, `Reflect(...)`")
        if not isinstance(self.replacement, str) and not callable(self.replacement):
            raise RedflagError(
                f"replacement is {self.replacement!r}, which cannot be shown; give a text, or a function that returns "
                "one"
            )
        taken: set[Any] = {*self.actions.values(), self.default}
        if any(ACTIONS[action].intervenes for action in taken):
            taken.add(self.confirmed)
        for action in taken:
            if (needed := ACTIONS[action].needs) and getattr(self, needed) == "":
                raise RedflagError(
                    f"an alarm leads to `{action}` and {needed} is empty; give the text that is shown then"
                )
        for name in ("max_interventions", "max_wait_tokens", "mute_limit"):
            _at_least(name, getattr(self, name), 0)
        if not _is_number(self.rearm) or not 0 < self.rearm <= 1:
            raise RedflagError(
                f"rearm is {self.rearm!r}, but it is the share of the threshold below which a muted alarm is armed "
                "again; give a number above 0 and at most 1"
            )
        if not _is_number(self.judge_timeout) or not 0 < self.judge_timeout < math.inf:
            raise RedflagError(
                f"judge_timeout is {self.judge_timeout!r}, so a second judge would always or never be late; give "
                "seconds"
            )
        if self.first_token is not None and not isinstance(self.first_token, FirstTokenRule):
            raise RedflagError(
                f"first_token is {self.first_token!r}, which decides nothing; give a `FirstTokenRule`, or None"
            )

    def decide(self, category: str) -> str:
        """The action that an alarm of this category leads to."""
        return "continue" if self.observe else self.actions.get(category, self.default)

    def asks(self, action: str) -> bool:
        """Whether any category's alarm leads to this action."""
        return not self.observe and action in {*self.actions.values(), self.default}

    def prompt_alarms(self, categories: Sequence[str], probs: Sequence[float]) -> list[Alarm]:
        """What the prompt's own thresholds say before the first token, the severest action first.

        An action that would review an answer halts: there is none yet.

        Args:
            categories: K categories.
            probs: K probabilities of the first step.
        """
        if self.prompt is None:
            return []
        alarms = []
        for category, prob in zip(categories, probs, strict=True):
            limit, action = self.prompt.values[category], self.decide(category)
            if prob >= limit:
                alarms.append(Alarm(0, category, prob, limit, "halt" if ACTIONS[action].intervenes else action))
        return sorted(alarms, key=lambda alarm: SEVERITY.index(alarm.action))

    @property
    def intervenes(self) -> bool:
        """Whether any category's alarm leads to something that only a live run can do."""
        return any(self.asks(action) for action, rule in ACTIONS.items() if rule.intervenes)

    def replacement_for(self, trace: Trace) -> str:
        """The text that is shown in place of the rest.

        Raises:
            RedflagError: The operator's function returned no text.
        """
        text = self.replacement if isinstance(self.replacement, str) else self.replacement(trace)
        if not isinstance(text, str):
            raise RedflagError(f"the replacement is {text!r}, which cannot be shown; let the function return a text")
        return text


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RedflagError(f"{name} is {value!r}, which has no meaning here; use one of {', '.join(allowed)}")


def _at_least(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise RedflagError(f"{name} is {value!r}, but it counts; give a whole number from {least} up")


def _flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise RedflagError(f"{name} is {value!r}; give true or false")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
