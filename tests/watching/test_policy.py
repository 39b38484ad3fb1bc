from __future__ import annotations

import pytest

from redflag.errors import RedflagError
from redflag.watching.policy import Policy

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


@pytest.mark.parametrize("action", ["reflect", "resume", "replace", "escalate", "stop", "", None, 3])
def test_an_action_that_cannot_be_carried_out_is_refused(action):
    with pytest.raises(RedflagError, match="use one of continue, halt"):
        Policy(actions={"weapons": action})
    with pytest.raises(RedflagError, match="use one of continue, halt"):
        Policy(default=action)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"hold_back": -1}, "hold_back"),
        ({"hold_back": 1.0}, "hold_back"),
        ({"hold_back": True}, "hold_back"),
        ({"observe": "yes"}, "observe"),
        ({"actions": ["halt"]}, "actions"),
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
