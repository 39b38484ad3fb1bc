from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.watching.first_token import Decision, FirstTokenRule
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

KINDS = ("fraud", "theft")
FIRST = MonitorConfig("first")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"compare": "yes"}, "compare"),
        ({"selected": "fraud"}, "selected"),
        ({"bias": {"fraud": math.inf}}, "bias"),
        ({"bias": 2.0}, "bias"),
        ({"thresholds": {"fraud": 0.0}}, "'fraud'"),
        ({"thresholds": {"fraud": 50}}, "'fraud'"),
    ],
)
def test_a_setting_without_meaning_is_refused_by_name(setting, words):
    with pytest.raises(RedflagError, match=words):
        FirstTokenRule(**setting)


@pytest.mark.parametrize(
    ("rule", "thresholds", "words"),
    [
        (FirstTokenRule(respond="fine"), Thresholds.manual(0.5, KINDS, FIRST), "respond .* 'fine'"),
        (FirstTokenRule(selected=("fine",)), Thresholds.manual(0.5, KINDS, FIRST), "selected .* 'fine'"),
        (FirstTokenRule(bias={"fine": 1.0}), Thresholds.manual(0.5, KINDS, FIRST), "bias .* 'fine'"),
        (FirstTokenRule(thresholds={"fine": 0.1}), Thresholds.manual(0.5, KINDS, FIRST), "thresholds .* 'fine'"),
        (FirstTokenRule(respond="fraud"), Thresholds.manual(0.5, ["fraud"], FIRST), "Nothing could be refused"),
        (FirstTokenRule(respond="fraud", selected=("fraud",)), Thresholds.manual(0.5, KINDS, FIRST), "Leave it out"),
        (FirstTokenRule(), Thresholds.manual(0.5, KINDS), "'max'"),
        (
            FirstTokenRule(temperature=2.0),
            Thresholds({"fraud": 0.5, "theft": 0.5}, FIRST, 0.01, "expected"),
            "false-alarm rate",
        ),
    ],
)
def test_a_rule_that_thresholds_do_not_fit_is_refused_before_the_first_step(rule, thresholds, words):
    with pytest.raises(RedflagError, match=words):
        Session(thresholds, Policy(first_token=rule), tuple(thresholds.values))


def test_a_moved_rule_may_bring_its_own_thresholds_or_compare():
    calibrated = Thresholds({"fraud": 0.5, "theft": 0.5}, FIRST, 0.01, "expected")
    FirstTokenRule(temperature=2.0, compare=True).check(calibrated)
    FirstTokenRule(temperature=2.0, thresholds={"fraud": 0.4, "theft": 0.4}).check(calibrated)


def test_a_policy_takes_a_rule_or_none():
    with pytest.raises(RedflagError, match="first_token"):
        Policy(first_token="compare")


@given(
    st.lists(st.floats(0, 0.5), min_size=2, max_size=2),
    st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    st.lists(st.floats(-5, 5), min_size=2, max_size=2),
)
def test_classes_are_a_distribution_and_without_settings_the_probabilities_themselves(probs, temperature, bias):
    given_ = dict(zip(KINDS, probs, strict=True))
    assert FirstTokenRule().classes(given_) == (given_, max(0.0, 1.0 - math.fsum(probs)))
    flags, rest = FirstTokenRule(temperature=temperature, bias=dict(zip(KINDS, bias, strict=True))).classes(given_)
    assert math.fsum([*flags.values(), rest]) == pytest.approx(1.0)
    assert all(0.0 <= p <= 1.0 for p in (*flags.values(), rest))


def test_upper_bounds_that_leave_nothing_for_ordinary_tokens_refuse():
    assert FirstTokenRule(compare=True).decide({"fraud": 0.8, "theft": 0.7}, {}) == Decision("fraud", "fraud", 0.8, 0.0)
