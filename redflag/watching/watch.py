"""The alarms of one part of a response: its monitor, its thresholds, and which alarms are muted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from redflag.errors import RedflagError
from redflag.watching.first_token import Decision
from redflag.watching.memory import raised
from redflag.watching.monitor import Monitor
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds


class Crossing(NamedTuple):
    """A score of flag `k` that has reached its threshold from below, and the policy's action."""

    k: int
    category: str
    score: float
    threshold: float
    action: str


class Watch:
    """Scores and crossings, step by step. A thought and its answer have separate ones; nothing is carried over."""

    def __init__(
        self, thresholds: Thresholds, policy: Policy, categories: Sequence[str], factors: Sequence[float] = ()
    ) -> None:
        """Starts before the part's first step; `categories` are in the order of the flag probabilities.

        `factors` are what earlier responses raise the scores by (`redflag.watching.memory`); empty: nothing.
        """
        self._factors = tuple(factors)
        self._monitor = Monitor(thresholds.monitor, len(categories))
        self._rules = [(name, thresholds.values[name], policy.decide(name)) for name in categories]
        self._policy = policy
        self._above = [False] * len(categories)
        self._mute = [0] * len(categories)  # steps for which each category's alarm is still muted

    def score(self, probs: tuple[float, ...]) -> tuple[float, ...]:
        """The K scores of the next step, raised by earlier responses.

        Raises:
            UnjudgedError: The probabilities cannot be judged.
        """
        scores = self._monitor.feed(probs)
        return tuple(map(raised, scores, self._factors)) if self._factors else scores

    def crossings(self, scores: tuple[float, ...], decision: Decision | None = None) -> list[Crossing]:
        """The categories that alarm at this step, in order; a `decision` replaces the thresholds."""
        crossings = []
        for k, (category, threshold, action) in enumerate(self._rules):
            score, above = scores[k], scores[k] >= threshold
            if self._mute[k]:
                self._mute[k] = 0 if score < self._policy.rearm * threshold else self._mute[k] - 1
                continue
            if decision is not None:
                score, threshold, above = decision.probability, decision.limit, category == decision.category
            if above and not self._above[k]:
                crossings.append(Crossing(k, category, score, threshold, action))
            self._above[k] = above
        return crossings

    def mute(self, flags: Sequence[int]) -> None:
        """Mutes the alarms of these flags, after a review, until the score has fallen."""
        for k in flags:
            self._mute[k] = self._policy.mute_limit
            self._above[k] = False

    def high(self, scores: tuple[float, ...]) -> bool:
        """Whether an alarm is muted, or a score has reached its threshold."""
        return any(self._mute) or any(score >= rule[1] for score, rule in zip(scores, self._rules, strict=True))


def check_fit(thresholds: Thresholds, policy: Policy, categories: Sequence[str], thought: bool = False) -> None:
    """Checks that thresholds, policy and flags match.

    Raises:
        RedflagError: A category has no threshold, a threshold or action no category, or the policy decides before the
            first token of a response that begins with a thought.
    """
    if len(set(categories)) != len(categories) or set(categories) != set(thresholds.values):
        raise RedflagError(
            f"thresholds must name exactly the flags {list(categories)} (got {list(thresholds.values)}). A flag "
            "without threshold would go unwatched."
        )
    if unknown := sorted(set(policy.actions) - set(categories)):
        raise RedflagError(f"actions must name flags among {list(categories)} (got {unknown}). Fix the names.")
    if policy.first_token is None:
        return
    policy.first_token.check(thresholds)
    if thought:
        raise RedflagError(
            "thinking must be off with a decision before the first token. A response with a thought has two that are "
            "first."
        )
