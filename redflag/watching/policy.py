"""Policies: which action an alarm leads to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from redflag.errors import RedflagError
from redflag.trace import Alarm, Trace
from redflag.watching.checks import check_flag, check_number, check_one_of, check_whole
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.thresholds import Thresholds

Action = Literal["continue", "halt", "reflect", "replace", "escalate", "force"]
"""Possible actions on an alarm; `ACTIONS` describes them."""


class ActionRule(NamedTuple):
    """Properties of an action.

    Attributes:
        intervenes: Whether the response waits for its outcome, which only a live run has. It costs one of
            `Policy.max_interventions`; if it confirms the alarm, `Policy.confirmed` follows.
        needs: The field of `Policy` that it requires.
    """

    help: str
    ends: bool = False
    intervenes: bool = False
    needs: str = ""


# The severest first: when several categories alarm at one step, the first of their actions in this order is taken.
#
# `halt` drops the tokens held back and ends the response; `replace` also shows a text of the operator's. `escalate`
# asks a second judge, `reflect` lets the model review its own response; both hide everything until there is a verdict.
# `force` drops the tokens held back, puts the flag into the context behind the text shown, and lets the model continue
# from there: a model trained with its flag in the text then writes a refusal. `continue` reports the alarm and lets the
# response go on.
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
    """How the model reflects: the text added behind the response so far, and how the verdict is read.

    The context is prompt, response tokens before the alarm, the flag, `cue`. The model then generates hidden tokens up
    to end-of-sequence, one of the `stop` texts or `max_tokens`.

    Attributes:
        cue: Text behind the flag that opens the reflection.
        verdict: `words` compares the probabilities of the two verdict words behind reflection and `verdict_cue`; `flag`
            takes the flag's probability there (without the cue).
        verdict_cue: Text that asks for the verdict.
        words: The harmful and the harmless word; their first tokens must differ.
        limit: Harm at and above which the verdict is harmful. For `words` harm is P(harmful) / (P(harmful) +
            P(harmless)).
        stop: Texts that end the reflection; they are part of it.
        system: Text at the head of the system message: examples of reflections after true and false alarms, which
            teach the model in context what a flag is for (soft use in "Red Flag Tokens", arXiv 2502.16366).
        stay: Whatever the verdict, the response continues in the context of the reflection, and nothing more is shown
            before the score has fallen. False returns to the prefix without the reflection on a harmless verdict.
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
                raise RedflagError(f"reflect.{name} must be a text (got {value!r}).")
        check_one_of("reflect.verdict", self.verdict, ("words", "flag"))
        words = self.words
        if isinstance(words, str) or len(words) != 2 or not all(isinstance(word, str) and word for word in words):
            raise RedflagError(f"reflect.words must be two texts, the harmful and the harmless word (got {words!r}).")
        if words[0] == words[1]:
            raise RedflagError(f"reflect.words must be two different words (got {words[0]!r} twice).")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise RedflagError(f"reflect.stop must be a list of texts, none empty (got {self.stop!r}).")
        check_number("reflect.limit", self.limit, "above 0 and at most 1", lambda x: 0 < x <= 1)
        check_whole("reflect.max_tokens", self.max_tokens)
        check_flag("reflect.stay", self.stay)


@dataclass(frozen=True)
class Policy:
    """Actions by category, when tokens are released, and the budgets of interventions.

    Attributes:
        actions: Category -> action; all other categories have `default`.
        default: Action of all other categories; fails closed by default.
        hold_back: h: a token is released when its own step and h more have been judged without a halting alarm. 0
            releases every token as soon as it is judged; each further step adds latency and withholds one more token
            *before* an alarm.
        observe: Audit only: alarms are reported, and every action is `continue`.
        release: `steps` releases token by token, `sentence` whole sentences, `end` only the complete response.
        confirmed: Action after a reflection or a second judge has confirmed the alarm, and after a forced flag behind
            which the score never falls: `halt` or `replace`.
        replacement: The text that `replace` shows, or a function of the trace that returns it.
        decoy: Show a replacement as if the model had written it: the stream ends without a mark.
        max_interventions: Maximum number of reflections, escalations and forced flags in one response; the next alarm
            halts.
        max_wait_tokens: Maximum number of hidden tokens in one response; when they are used up, an alarm halts.
        rearm: A muted alarm is armed again once its score is below this share of its threshold.
        mute_limit: ... and after this many steps in any case: a score that stays high then alarms again.
        judge_timeout: Time limit of a second judge, seconds.
        thoughts: Whether thoughts are shown, separately from the answer. Hidden ones are judged too.
        first_token: Decides before the first token which category alarms, instead of one threshold per category; for
            thresholds of the monitor `first`. An alarm leads to its action as usual; a flag that says "respond" is put
            into the context without an alarm.
        prompt: Thresholds of the prompt itself, on the probabilities before the first token (`redflag calibrate
            --prompts`), at which it is halted before anything is shown. None = prompts are not judged.

    Raises:
        RedflagError: A value is invalid.

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
            raise RedflagError(f"actions must be a mapping from categories (got {self.actions!r}).")
        # A copy: the actions must not change during a session.
        object.__setattr__(self, "actions", dict(self.actions))
        for whose, action in (*self.actions.items(), ("all others", self.default)):
            check_one_of(f"the action for {whose}", action, get_args(Action))
        check_whole("hold_back", self.hold_back)
        check_flag("observe", self.observe)
        check_one_of("release", self.release, get_args(Release))
        check_one_of("thoughts", self.thoughts, ("hide", "show"))
        check_one_of("confirmed", self.confirmed, ("halt", "replace"))
        check_flag("decoy", self.decoy)
        if not isinstance(self.reflect, Reflect):
            raise RedflagError(f"reflect must be the settings of a reflection, `Reflect(...)` (got {self.reflect!r}).")
        if not isinstance(self.replacement, str) and not callable(self.replacement):
            raise RedflagError(
                f"replacement must be a text, or a function that returns one (got {self.replacement!r})."
            )
        in_use: set[Any] = {*self.actions.values(), self.default}
        if any(ACTIONS[action].intervenes for action in in_use):
            in_use.add(self.confirmed)
        for action in in_use:
            if (needed := ACTIONS[action].needs) and getattr(self, needed) == "":
                raise RedflagError(f"{needed} must not be empty with the action `{action}`. Give the text to show.")
        for name in ("max_interventions", "max_wait_tokens", "mute_limit"):
            check_whole(name, getattr(self, name))
        check_number("rearm", self.rearm, "above 0 and at most 1, a share of the threshold", lambda x: 0 < x <= 1)
        seconds = "a finite number above 0, in seconds"
        check_number("judge_timeout", self.judge_timeout, seconds, lambda x: 0 < x < math.inf)
        if self.first_token is not None and not isinstance(self.first_token, FirstTokenRule):
            raise RedflagError(f"first_token must be a `FirstTokenRule` or None (got {self.first_token!r}).")

    def decide(self, category: str) -> str:
        """The action that an alarm of this category leads to."""
        return "continue" if self.observe else self.actions.get(category, self.default)

    def asks(self, action: str) -> bool:
        """Whether any category's alarm leads to this action."""
        return not self.observe and action in {*self.actions.values(), self.default}

    def prompt_alarms(self, categories: Sequence[str], probs: Sequence[float]) -> list[Alarm]:
        """Alarms of the prompt's own thresholds before the first token, the severest action first.

        Actions that review an answer become `halt`, since there is no answer yet.
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
        """Whether any category's alarm leads to an intervention, which only a live run can do."""
        return any(self.asks(action) for action, rule in ACTIONS.items() if rule.intervenes)

    def replacement_for(self, trace: Trace) -> str:
        """The text that is shown instead of the rest.

        Raises:
            RedflagError: The operator's function returned no text.
        """
        text = self.replacement if isinstance(self.replacement, str) else self.replacement(trace)
        if not isinstance(text, str):
            raise RedflagError(f"the replacement function must return a text (got {text!r}).")
        return text
