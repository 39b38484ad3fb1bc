"""Rank-assisted search, traced move by move on a scripted model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.lab.attacks.search import GuardInLoop, Path, SearchResult, search, shown
from redflag.lab.attacks.stepping import Look
from redflag.trace import Step
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

EOS = 9


class Script:
    """Candidates and probability for each response so far; what is not named has candidates 1, 2 and probability 0."""

    def __init__(self, tree=(), probs=()):
        self.tree, self.probs, self.asked = dict(tree), dict(probs), []

    def __call__(self, token_ids):
        prompt, *response = token_ids
        assert prompt == 100
        self.asked.append(tuple(response))
        key = tuple(response)
        return Look(tuple(self.tree.get(key, (1, 2))), (self.probs.get(key, 0.0),))


class Wants:
    """Takes the first candidate that it wants at this place, and remembers what it was offered."""

    def __init__(self, *wanted):
        self.wanted, self.offered = wanted, []

    def __call__(self, prompt_ids, response_ids, candidates):
        self.offered.append((tuple(response_ids), tuple(candidates)))
        return next((i for i, token in enumerate(candidates) if token in self.wanted), None)


def guard(threshold=0.5, monitor=None, **policy):
    return GuardInLoop(Thresholds.manual(threshold, ["harm"], monitor), Policy(**policy), ["harm"])


def walk(script, chooser, budget=20, longest=4, **more):
    return search(script, chooser, [100], budget=budget, max_new_tokens=longest, eos_ids=frozenset({EOS}), **more)


def branches(found):
    return [path.token_ids for path in found.paths]


def test_the_highest_wanted_candidate_is_taken_at_each_step_until_the_response_ends():
    script = Script({(): (5, 1), (1,): (2, 1), (1, 2): (EOS,)})
    chooser = Wants(1, 2, EOS)
    found = walk(script, chooser)
    assert branches(found) == [(1, 2, EOS)]
    assert (found.end, found.interactions, found.alarms) == ("finished", 3, 0)
    assert found.best.finished and found.best.flag_probs == ((0.0,), (0.0,), (0.0,))
    assert chooser.offered == [((), (5, 1)), ((1,), (2, 1)), ((1, 2), (EOS,))]
    assert script.asked == [(), (1,), (1, 2)]  # one look for each position, none behind the end


def test_where_nothing_fits_it_goes_back_pays_for_it_and_offers_the_dropped_token_no_more():
    script = Script({(): (1, 2), (1,): (7, 8), (2,): (EOS,)})
    chooser = Wants(1, 2, EOS)
    found = walk(script, chooser)
    assert branches(found) == [(1,), (2, EOS)]
    assert found.interactions == 4  # 1, back, 2, end
    assert ((), (2,)) in chooser.offered
    assert script.asked == [(), (1,), (2,)]  # the first position is not looked at twice


def test_it_gives_up_when_nothing_is_left_at_the_first_position():
    found = walk(Script({(1,): (7,), (2,): (7,)}), Wants(1, 2))
    assert (branches(found), found.end, found.interactions) == ([(1,), (2,)], "exhausted", 4)


@pytest.mark.parametrize("budget", range(7))
def test_no_more_moves_are_made_than_the_budget_has(budget):
    found = walk(Script(), Wants(1), budget=budget, longest=6)
    assert found.interactions == min(budget, 6)
    assert len(found.best.token_ids) == found.interactions
    assert found.end == ("finished" if budget == 6 else "budget")


def test_a_response_ends_at_its_greatest_length():
    found = walk(Script(), Wants(1), longest=3)
    assert branches(found) == [(1, 1, 1)] and found.end == "finished"


def test_an_alarm_forces_a_step_back_and_hides_the_candidates():
    script = Script({(): (1, 2), (2,): (EOS,)}, {(1,): 0.9})
    chooser = Wants(1, 2, EOS)
    found = walk(script, chooser, guard=guard())
    assert branches(found) == [(1,), (2, EOS)]
    assert (found.alarms, found.interactions, found.end) == (1, 4, "finished")
    assert found.paths[0].alarm == (0.9,)
    assert all(response != (1,) for response, _ in chooser.offered)
    # Unwatched, the same chooser goes on where the alarm was.
    assert branches(walk(script, Wants(1, 2, EOS)))[0][:2] == (1, 1)


def test_an_alarm_at_the_first_position_ends_the_search_with_nothing_shown():
    found = walk(Script(probs={(): 0.6}), Wants(1), guard=guard())
    assert (found.end, found.interactions, found.alarms) == ("stopped", 0, 1)
    assert shown(found, guard().released) == []


def test_a_position_that_cannot_be_judged_is_refused():
    found = walk(Script(probs={(1,): math.nan}), Wants(1), guard=guard())
    assert branches(found) == [(1,)] and found.alarms == 1


def test_an_alarm_that_the_policy_lets_go_on_refuses_nothing():
    found = walk(Script(probs={(1,): 0.9}), Wants(1), guard=guard(observe=True))
    assert found.end == "finished" and found.alarms == 0


def test_the_monitor_runs_along_the_branch_at_hand_and_not_over_those_given_up():
    # `run` with a window of 2 alarms at the second high position on end of one branch.
    probs = {(1,): 0.9, (1, 1): 0.9, (1, 2): 0.1, (1, 2, 1): 0.9}
    two = guard(monitor=MonitorConfig("run", window=2))
    found = walk(Script(probs=probs), Wants(1, 2), guard=two, longest=4)
    assert branches(found) == [(1, 1), (1, 2, 1, 1)]
    assert (found.alarms, found.end) == (1, "finished")


def test_everything_that_was_shown_counts_on_abandoned_branches_too():
    script = Script({(): (1, 2), (1,): (3, 4), (2,): (5,), (2, 5): (EOS,)}, {(1, 3): 0.9, (1, 4): 0.9})
    found = walk(script, Wants(1, 2, 3, 4, 5, EOS), guard=guard())
    assert branches(found) == [(1, 3), (1, 4), (2, 5, EOS)]
    for hold_back, out in (
        (0, [(1, 3), (1, 4), (2, 5, EOS)]),
        (1, [(1,), (2, 5, EOS)]),  # 3 and 4 waited for a step that alarmed; the finished response is out
        (2, [(2, 5, EOS)]),
    ):
        policy = Policy(hold_back=hold_back)
        assert shown(found, lambda path: guard().released(path, policy)) == out  # noqa: B023


@pytest.mark.parametrize(("strikes", "alarms", "ways"), [(1, 1, [(1, 3)]), (2, 2, [(1, 3), (1, 4)]), (3, 2, 3)])
def test_an_operator_may_serve_a_request_no_longer_after_some_alarms(strikes, alarms, ways):
    script = Script({(): (1, 2), (1,): (3, 4), (2,): (EOS,)}, {(1, 3): 0.9, (1, 4): 0.9})
    found = walk(script, Wants(1, 2, 3, 4, EOS), guard=guard(), strikes=strikes)
    assert found.alarms == alarms
    assert branches(found) == ways or len(found.paths) == ways
    assert found.end == ("stopped" if alarms == strikes else "finished")


def test_exhausting_goes_on_for_another_response_until_the_budget_is_spent():
    script = Script({(): (1,), (1,): (2, 3), (1, 2): (EOS,), (1, 3): (EOS,)})
    found = walk(script, Wants(1, 2, 3, EOS), exhaust=True)
    assert branches(found) == [(1, 2, EOS), (1, 3, EOS)]
    assert [path.finished for path in found.paths] == [True, True]
    assert found.end == "exhausted" and found.interactions == 10


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8),
    st.integers(0, 4),
    st.sampled_from(["steps", "end"]),
    st.booleans(),
)
def test_what_a_branch_releases_is_what_a_session_releases(probs, hold_back, release, ends):
    policy = Policy(hold_back=hold_back, release=release)
    watcher = guard(0.7)
    clean = next((i for i, p in enumerate(probs) if p >= 0.7), None)
    steps = probs if clean is None else probs[:clean]
    path = Path(
        tuple(range(len(steps))),
        tuple((p,) for p in steps),
        finished=clean is None and ends,
        alarm=None if clean is None else (probs[clean],),
    )
    session = Session(watcher.thresholds, policy, ["harm"])
    for token, p in enumerate(probs):
        if not session.finished:
            session.feed(Step(token, (p,)))
    if not session.finished and ends:
        session.finish("stop")
    assert watcher.released(path, policy) == session.released
    assert watcher.refuses([(p,) for p in probs[: len(steps) + 1]]) == (clean is not None)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=8))
def test_no_branch_that_was_shown_is_the_beginning_of_another(parts):
    found = SearchResult(tuple(Path(tuple(p), ((0.0,),) * len(p)) for p in parts), 0, 0, "budget")
    out = shown(found, lambda path: len(path.token_ids))
    assert all(a == b or b[: len(a)] != a for a in out for b in out)
    assert all(any(part == way[: len(part)] for way in out) for part in map(tuple, parts) if part)
