"""A halt on request, for an operator's tests: the alarm is simulated, all that follows is real."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from redflag.backends import AsyncStreams, Sampling
from redflag.guard.guard import Guard
from redflag.trace import Step
from redflag.watching.policy import ACTIONS, Policy
from redflag.watching.thresholds import Thresholds


def rehearsing(guard: Guard, policy: Policy | None = None) -> Guard:
    """The guard with thresholds of 0.5, and with a policy under which every alarm ends the response.

    A review is replaced by the action after one that confirms the alarm.
    """
    policy = policy or guard.policy
    action = policy.default if ACTIONS[policy.default].ends else policy.confirmed
    spec = guard.spec
    thresholds = Thresholds.manual(0.5, spec.categories, run_id=spec.run_id, template_hash=spec.template_hash)
    if action == "replace" and not policy.replacement:
        action = "halt"
    policy = replace(policy, actions={}, default=action, observe=False, first_token=None, prompt=None)
    return Guard(guard.backend, guard.tokenizer, spec, thresholds, policy, guard.judge)


class Alarmed:
    """An engine whose flags have probability 1 at token `at`, or at the response's end if that is earlier."""

    def __init__(self, engine: AsyncStreams, eos_ids: frozenset[int], at: int) -> None:
        self._engine, self._eos_ids, self._at = engine, eos_ids, at

    async def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        flags: tuple[float, ...] = ()
        async with aclosing(self._engine.astream(token_ids, sampling, watch)) as steps:
            for index in range(self._at + 1):
                step = await anext(steps, None)
                if step is None:  # a length limit: the alarm replaces the end
                    yield Step(min(self._eos_ids), (1.0,) * len(flags))
                    return
                flags = step.flag_probs
                high = index == self._at or step.token_id in self._eos_ids
                yield step._replace(flag_probs=(1.0,) * len(flags)) if high else step
