"""Replays a recorded response under another policy."""

from __future__ import annotations

from redflag.errors import RedflagError
from redflag.trace import Done, Halt, Trace
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds


def replay(trace: Trace, thresholds: Thresholds, policy: Policy) -> Trace:
    """Replays a recorded response under other thresholds or another policy.

    Record under `Policy(observe=True)`: a halted recording cannot be continued.

    Returns:
        A new trace with the same `id`, `meta` and steps, as far as they were needed; its `Text` events have no text.

    Raises:
        RedflagError: The response was halted where these thresholds and policy would have continued, or an alarm leads
            to a reflection, a second judge or a forced flag, which need a live run.
    """
    if any(event.counts_as == "taken" for event in trace.events):
        raise RedflagError(
            f"trace {trace.id!r} must not have a flag forced into its context. How it would have continued without is "
            "unknown. Replay traces recorded under observe."
        )
    session = Session(thresholds, policy, trace.categories, thought=trace.answer_at != 0, trace_id=trace.id)
    session.trace.meta = dict(trace.meta)
    session.remember(trace.meta.get("earlier", ()))
    if session.finished:
        return session.trace
    for step in trace.steps():
        session.feed(step)
        if session.finished:
            return session.trace
        if session.pending:
            raise RedflagError(
                f"trace {trace.id!r} would {session.pending.kind} at token {session.pending.position}, which needs a "
                "live run. Replay with actions halt, replace or continue."
            )
        if trace.answer_at == len(session.trace.token_ids):
            session.begin_answer(lambda token_id: None)
            if session.finished:
                return session.trace
    end = trace.end
    if isinstance(end, Done):
        session.finish(end.reason)
    elif isinstance(end, Halt) and end.reason == "fault":
        session.fault(end.detail)
    elif isinstance(end, Halt):
        raise RedflagError(
            f"trace {trace.id!r} was halted at token {end.position}, and how it would have continued is unknown. "
            "Replay traces recorded under observe."
        )
    return session.trace
