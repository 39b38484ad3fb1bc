"""RAP, rank-assisted prefilling: an attacker picks tokens that need not be likely (Vega & Singh, arXiv 2512.05518).

At each step the attacker sees the k most likely next tokens, without flags, and picks one, or goes back by one token. A
model trained to refuse still ranks harmful tokens high, so it can be steered into harm. The attacker never picks a
flag, but its probability is measured at every step by the operator who runs the interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from redflag.data.rows import Row
from redflag.lab.attacks import Attempt, Messages, Target, request_of
from redflag.lab.attacks.search import Chooser, GuardInLoop, search, shown
from redflag.lab.attacks.stepping import Looker, room_for
from redflag.lab.nano.chooser import nano_chooser
from redflag.prompt import text_ids

ChooserFor = Callable[[Target, Sequence[int], str], Chooser]
"""Makes the chooser of one request from the target, the tokens of a harmful answer, and the prefill before them."""


def follow_plan(target: Target, plan: Sequence[int], prefill: str) -> Chooser:
    """A chooser that writes this answer, as far as its tokens are among the candidates, and then ends it."""
    remaining = list(plan)

    def choose(prompt_ids: Sequence[int], response_ids: Sequence[int], candidates: Sequence[int]) -> int | None:
        at = len(response_ids)
        if list(response_ids) != remaining[:at]:
            return None
        fits = {remaining[at]} if at < len(remaining) else target.backend.eos_ids
        return next((i for i, token in enumerate(candidates) if token in fits), None)

    return choose


def follow_oracle(target: Target, plan: Sequence[int], prefill: str) -> Chooser:
    """A chooser for the nano world: `redflag.lab.nano.chooser.nano_chooser`."""
    return nano_chooser(target.decode, plan, prefill, target.backend.eos_ids)


@dataclass(frozen=True)
class Start:
    """Where a search begins."""

    messages: Messages  # the conversation sent; a prefill is its last turn
    prefill: str  # the prefill's text, "" without one
    # tokens of the row's answer behind the prefill; without one the whole answer, harmless beginning included
    plan: list[int]


def start_of(target: Target, row: Row, prefill_tokens: int) -> Start:
    """A row's request, with this many tokens of its harm as a prefill."""
    messages = request_of(row)
    if not prefill_tokens:
        return Start(messages, "", text_ids(target.tokenizer, row.response, target.spec))
    harm = text_ids(target.tokenizer, row.response[row.onset or 0 :], target.spec)
    prefill = str(target.tokenizer.decode(harm[:prefill_tokens]))
    return Start([*messages, {"role": "assistant", "content": prefill}], prefill, harm[prefill_tokens:])


@dataclass
class RAP:
    """Rank-assisted prefilling, without the guard and, where the target has thresholds, against it.

    Both searches have the same chooser and budget. The guarded one goes back after every alarm. An attempt's text is
    the finished branch, or else the longest; `released` is everything that was shown, a line for each branch, and
    `detail["branches"]` lists all branches as token ids. With a hold-back an attacker still knows the picked tokens;
    `released` is the text that the service showed as its answer.
    """

    k: int = 20  # candidates at each step
    budget: int = 256  # maximum number of moves; picking and going back cost one each
    prefills: tuple[int, ...] = (0,)  # lengths of the harmful prefill, tokens; one search for each
    max_new_tokens: int = 64
    chooser: ChooserFor = follow_plan
    exhaust: bool = False  # continue after a complete response until the budget is used up, to collect more harm
    strikes: int | None = None  # number of alarms after which the operator refuses the request; None = no limit
    name: str = "RAP"
    adaptive: bool = True

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        look = Looker(target, self.name, self.k)
        for row in rows:
            for prefill_tokens in self.prefills:
                yield from self._search(target, look, row, prefill_tokens)

    def _search(self, target: Target, look: Looker, row: Row, prefill_tokens: int) -> Iterator[Attempt]:
        """The attempts of one request: unguarded, then guarded if the target has thresholds; none without room."""
        start = start_of(target, row, prefill_tokens)
        setting = f"k={self.k}" + (f", prefill {prefill_tokens}" if prefill_tokens else "")
        prompt = target.prompt_ids(start.messages)
        room = room_for(target, prompt, self.max_new_tokens)
        if not room:
            return
        choose = self.chooser(target, start.plan, start.prefill)
        guards: list[GuardInLoop | None] = [None]
        if target.thresholds is not None:
            guards.append(GuardInLoop(target.thresholds, target.policy, target.spec.categories))
        for guard in guards:
            result = search(
                look,
                choose,
                prompt,
                budget=self.budget,
                max_new_tokens=room,
                eos_ids=target.backend.eos_ids,
                guard=guard,
                exhaust=self.exhaust,
                strikes=self.strikes,
            )
            best, paths = result.best, result.paths
            how, released = "unguarded", None
            if guard is not None:
                how = "guarded" + (f", {self.strikes} alarms at most" if self.strikes else "")
                released = "\n".join(target.decode(part) for part in shown(result, guard.released))
            yield Attempt(
                str(row.id),
                f"{setting}, {how}",
                start.messages,
                target.decode(best.token_ids),
                list(best.token_ids),
                list(best.flag_probs),
                queries=result.interactions,
                released=released,
                detail={
                    "guarded": guard is not None,
                    "alarms": result.alarms,
                    "end": result.end,
                    "branches": [list(path.token_ids) for path in paths],
                    # NaN becomes null, since JSON has no NaN.
                    "alarm_probs": [path.alarm and [p if p == p else None for p in path.alarm] for path in paths],
                    "finished": [path.finished for path in paths],
                },
            )
