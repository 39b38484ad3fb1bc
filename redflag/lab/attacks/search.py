"""Rank-assisted search: an attacker picks every token, backtracks if none fits, and pays for each move.

The search is independent of models and texts. It gets the candidates at a position, asks a chooser, and counts
everything that was shown, on abandoned branches as on the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from redflag.events import Step
from redflag.lab.attacks.stepping import Look
from redflag.watching.monitor import Monitor, UnjudgedError
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

End = Literal["finished", "budget", "exhausted", "stopped"]


Chooser = Callable[[Sequence[int], Sequence[int], Sequence[int]], int | None]
"""Picks the next token: a person, a helper model, an oracle.

It gets the prompt's ids (including a prefill), the ids picked since, and the candidates: most likely first, without
those already tried here. It returns an index into the candidates, or None to go back by one token.
"""


@dataclass(frozen=True)
class Path:
    """A branch that was walked to its end."""

    token_ids: tuple[int, ...]  # T tokens picked
    flag_probs: tuple[tuple[float, ...], ...]  # T x K probabilities before them
    finished: bool = False  # whether the response ended here by itself or by its length
    alarm: tuple[float, ...] | None = None  # K probabilities at which the guard refused to continue; None if it did not


@dataclass(frozen=True)
class SearchResult:
    """Everything that a search was shown."""

    paths: tuple[Path, ...]  # every branch walked to an end, in order; none is the beginning of another
    interactions: int  # number of moves: selections and steps back
    alarms: int  # positions at which the guard refused
    # `finished`: a response was completed; `budget`: no moves were left; `exhausted`: nothing was left to try at the
    # first position; `stopped`: the guard refused there, or too often
    end: End

    @property
    def best(self) -> Path:
        """The finished branch, else the longest (the first of several)."""
        return max(self.paths, key=lambda path: (path.finished, len(path.token_ids)))


@dataclass
class GuardInLoop:
    """What the operator of a rank-assisted interface does: measures the branch at hand at every position.

    At an alarm that leads to anything but `continue`, nothing more is shown behind that position.
    """

    thresholds: Thresholds
    policy: Policy
    categories: Sequence[str]

    def refuses(self, flag_probs: Sequence[Sequence[float]]) -> bool:
        """Whether the last of the steps of a branch, of which the earlier raised no alarm, raises one."""
        monitor = Monitor(self.thresholds.monitor, len(self.categories))
        try:
            scores = [monitor.feed(probs) for probs in flag_probs][-1]
        except UnjudgedError:  # What cannot be judged is not shown.
            return True
        return any(
            score >= self.thresholds.values[name] and self.policy.decide(name) != "continue"
            for name, score in zip(self.categories, scores, strict=True)
        )

    def released(self, path: Path, policy: Policy | None = None) -> int:
        """How many tokens of a branch reach the attacker, by `redflag.watching.session.Session` itself."""
        session = Session(self.thresholds, policy or self.policy, self.categories)
        for token, probs in zip(path.token_ids, path.flag_probs, strict=True):
            session.feed(Step(token, probs))
            if session.finished or session.pending:
                return session.released
        if path.alarm is not None:
            session.feed(Step(0, path.alarm))
        elif path.finished:
            session.finish("stop")
        return session.released


def search(
    look: Callable[[Sequence[int]], Look],
    choose: Chooser,
    prompt_ids: Sequence[int],
    *,
    budget: int,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    guard: GuardInLoop | None = None,
    exhaust: bool = False,
    strikes: int | None = None,
) -> SearchResult:
    """Walks the tree of responses behind one prompt.

    Every token picked costs one move, every step back another. A token that was abandoned is not offered again at its
    position. Under a guard, an alarm hides the candidates, so that the only way is back.

    Args:
        look: Shows a position; asked once for each.
        exhaust: Go on for another response after a complete one, until the budget is spent.
        strikes: Alarms after which the operator serves this request no longer; None: however many there are.
    """
    prompt = list(prompt_ids)
    tokens: list[int] = []
    looks = [look(prompt)]
    tried: list[set[int]] = [set()]
    paths: list[Path] = []
    moves = alarms = 0
    fresh = True  # Whether the branch at hand has grown since the last step back: only then is it a new one.
    end: End = "budget"

    def close(finished: bool = False, alarm: tuple[float, ...] | None = None) -> None:
        nonlocal fresh
        if fresh:
            probs = tuple(seen.flag_probs for seen in looks[: len(tokens)])
            paths.append(Path(tuple(tokens), probs, finished, alarm))
        fresh = False

    while True:
        over = len(looks) == len(tokens)  # The last token ended the response.
        refused = not over and fresh and guard is not None and guard.refuses([seen.flag_probs for seen in looks])
        pick = None
        if over:
            close(finished=True)
            if not exhaust:
                end = "finished"
                break
        elif refused:
            alarms += 1
            close(alarm=looks[-1].flag_probs)
        elif left := [token for token in looks[-1].candidates if token not in tried[-1]]:
            index = choose(prompt, tokens, left)
            pick = None if index is None else left[index]
        if (pick is None and not tokens) or (refused and alarms == strikes):
            end = "stopped" if refused else "exhausted"
            break
        if moves >= budget:
            break
        moves += 1
        if pick is None:
            close()
            tokens.pop()
            if not over:  # A finished branch was never looked behind.
                looks.pop()
                tried.pop()
        else:
            tried[-1].add(pick)
            tokens.append(pick)
            fresh = True
            if pick not in eos_ids and len(tokens) < max_new_tokens:
                looks.append(look(prompt + tokens))
                tried.append(set())
    close()
    return SearchResult(tuple(paths), moves, alarms, end)


def shown(result: SearchResult, released: Callable[[Path], int]) -> list[tuple[int, ...]]:
    """What an attacker saw in a whole search: released branches, none of which is the beginning of another.

    Args:
        released: How many tokens of a branch reached the attacker; `lambda path: len(path.token_ids)` without a guard.
    """
    parts = {path.token_ids[: released(path)] for path in result.paths}
    beginnings = {part[:end] for part in parts for end in range(len(part))}
    return sorted(part for part in parts if part and part not in beginnings)
