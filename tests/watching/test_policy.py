from __future__ import annotations

from typing import get_args

import pytest

from redflag.errors import RedflagError
from redflag.trace import Trace
from redflag.watching.policy import ACTIONS, SEVERITY, Action, Policy, Reflect

TABLE = [
    ("halts unless told otherwise", Policy(), "weapons", "halt"),
    ("a named category has its action", Policy(actions={"weapons": "continue"}), "weapons", "continue"),
    ("other categories have the default", Policy(actions={"weapons": "continue"}), "fraud", "halt"),
    ("the default can be changed", Policy(default="continue"), "fraud", "continue"),
    (
        "a named category overrides the default",
        Policy(actions={"weapons": "halt"}, default="continue"),
        "weapons",
        "halt",
    ),
    ("observe never halts", Policy(actions={"weapons": "halt"}, observe=True), "weapons", "continue"),
]


@pytest.mark.parametrize(("policy", "category", "action"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_decides(policy, category, action):
    assert policy.decide(category) == action


@pytest.mark.parametrize("action", ["resume", "observe", "stop", "", None, 3])
def test_an_action_that_cannot_be_carried_out_is_refused(action):
    with pytest.raises(RedflagError, match="must be one of continue, halt"):
        Policy(actions={"weapons": action})
    with pytest.raises(RedflagError, match="must be one of continue, halt"):
        Policy(default=action)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"hold_back": -1}, "hold_back"),
        ({"hold_back": 1.0}, "hold_back"),
        ({"hold_back": True}, "hold_back"),
        ({"observe": "yes"}, "observe"),
        ({"actions": ["halt"]}, "actions"),
        ({"release": "words"}, "release"),
        ({"confirmed": "continue"}, "confirmed"),
        ({"decoy": 1}, "decoy"),
        ({"reflect": {}}, "reflect"),
        ({"replacement": 3}, "replacement"),
        ({"default": "replace"}, "replacement must not be empty"),
        ({"actions": {"weapons": "reflect"}, "confirmed": "replace"}, "replacement must not be empty"),
        ({"max_interventions": -1}, "max_interventions"),
        ({"max_wait_tokens": 2.5}, "max_wait_tokens"),
        ({"mute_limit": True}, "mute_limit"),
        ({"rearm": 0}, "rearm"),
        ({"rearm": 1.5}, "rearm"),
        ({"rearm": float("nan")}, "rearm"),
        ({"judge_timeout": 0}, "judge_timeout"),
        ({"judge_timeout": float("inf")}, "judge_timeout"),
    ],
)
def test_bad_options_are_refused_by_name(options, name):
    with pytest.raises(RedflagError, match=name):
        Policy(**options)


def test_later_changes_to_the_mapping_do_not_reach_the_policy():
    actions = {"weapons": "halt"}
    policy = Policy(actions=actions)
    actions["weapons"] = "continue"
    assert policy.decide("weapons") == "halt"


@pytest.mark.parametrize(
    "options",
    [
        {"cue": None},
        {"verdict": "feeling"},
        {"words": "harmful"},
        {"words": ("a", "a")},
        {"words": ("a", "")},
        {"limit": 0},
        {"limit": 1.1},
        {"max_tokens": -1},
        {"stop": "\n"},
        {"stop": ("",)},
        {"stay": "yes"},
    ],
    ids=repr,
)
def test_a_reflection_that_cannot_be_carried_out_is_refused_by_name(options):
    with pytest.raises(RedflagError, match=f"reflect.{next(iter(options))}"):
        Reflect(**options)


def test_a_replacement_may_be_made_from_the_trace():
    policy = Policy(default="replace", replacement=lambda trace: f"after {len(trace.token_ids)} tokens")
    assert policy.replacement_for(Trace(token_ids=[1, 2])) == "after 2 tokens"
    with pytest.raises(RedflagError, match="must return a text"):
        Policy(default="replace", replacement=lambda trace: None).replacement_for(Trace())


def test_every_action_is_in_the_table_and_the_severest_is_first():
    assert set(ACTIONS) == set(get_args(Action))
    assert SEVERITY == ("halt", "replace", "escalate", "reflect", "force", "continue")
    # What ends a response goes before what waits, and what only reports comes last.
    kinds = [(rule.ends, rule.intervenes) for rule in ACTIONS.values()]
    assert kinds == sorted(kinds, reverse=True) and kinds[-1] == (False, False)


@pytest.mark.parametrize("action", ACTIONS)
def test_what_an_action_is_decides_what_it_asks_for(action):
    rule = ACTIONS[action]
    assert Policy(default=action, replacement="x").intervenes == rule.intervenes
    assert not Policy(default=action, replacement="x", observe=True).intervenes
    if rule.needs or rule.intervenes:  # what confirms an alarm may itself need something
        with pytest.raises(RedflagError, match="replacement"):
            Policy(default=action, confirmed="replace")
    else:
        Policy(default=action)
