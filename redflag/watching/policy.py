"""What an alarm leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from redflag.errors import RedflagError

Action = Literal["continue", "halt"]
"""What a session can do about an alarm.

`continue` reports it and lets the response go on; `halt` drops what is held back and ends the response.

The seam: `reflect`, `resume`, `replace` and `escalate` belong here too once they exist. An action gets its name in this
`Literal` and its branch in `Session.feed`, the only place that looks at actions; an action that only edits the prefix
needs nothing else.
"""


@dataclass(frozen=True)
class Policy:
    """Category -> action, and how far release lags behind judgement.

    Attributes:
        actions: Category -> action; for categories that are not named, `default`.
        default: Fails closed unless told otherwise.
        hold_back: h: a token is released when its own step and h more have been judged without a halting alarm. 0
            releases every token as soon as it is judged; every further step is latency that keeps back one more token
            *before* an alarm.
        observe: Shadow mode: alarms are reported, and every action is `continue`.

    Raises:
        RedflagError: For an action that does not exist or a hold-back that counts nothing.

    Example:
        >>> policy = Policy(actions={"profanity": "continue"}, hold_back=4)
        >>> policy.decide("profanity"), policy.decide("weapons")
        ('continue', 'halt')
    """

    actions: Mapping[str, str] = field(default_factory=dict)
    default: str = "halt"
    hold_back: int = 0
    observe: bool = False

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

    def decide(self, category: str) -> str:
        """The action that an alarm of this category leads to."""
        return "continue" if self.observe else self.actions.get(category, self.default)
