"""S2, refusal tokens (arXiv 2412.06748): the published inference rule and everything that turns it up and down.

`published` is a re-implementation of the released scripts over a whole vocabulary: softmax with a temperature, argmax,
the token that is appended to the prompt.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusal_sweep import KINDS, RESPOND, ROOT, script

from redflag.calibrating.calibrate import calibrate
from redflag.data.rows import load_rows
from redflag.flags import FlagSpec
from redflag.lab.nano.rows import nano_rows
from redflag.trace import Alarm, Done, Halt, Step, Text
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

logit = st.floats(-8, 8).map(lambda z: round(z, 3))


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


def published(
    kinds: list[float],
    respond: float,
    words: list[float],
    threshold: float,
    selected: set[int] | None = None,
    temperature: float = 1.0,
) -> int | None:
    """Index of the category whose token the released scripts append; None for anything else.

    Args:
        kinds: Logits of the category tokens; one: the script for [refuse] and [respond].
        respond: Logit of [respond].
        words: Logits of ordinary tokens.
        threshold: T; -1 compares.
        selected: Of several kinds, those that T is for.
        temperature: Of the softmax.
    """
    p = softmax([*kinds, respond, *words], temperature)
    if selected is None:
        refuse = p[0] >= p[1] if threshold == -1 else p[0] >= threshold
        return 0 if refuse else None
    top = int(np.argmax(p[: len(kinds)]))
    if top in selected:
        return top if p[top] >= threshold else None
    original = int(np.argmax(p))
    return original if original < len(kinds) else None


def ours(rule: FirstTokenRule, kinds: list[float], respond: float, words: list[float], threshold: float) -> int | None:
    """The same question put to the rule, which sees only the flags' probabilities."""
    p = softmax([*kinds, respond, *words])
    names = KINDS[: len(kinds)]
    decided = rule.decide(dict(zip((*names, RESPOND), p, strict=False)), dict.fromkeys(names, threshold))
    return None if decided.category is None else names.index(decided.category)


def close(*pairs: tuple[float, float]) -> bool:
    """Whether a comparison hangs on rounding."""
    return any(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs)


@pytest.mark.parametrize(
    ("refuse", "respond", "limit", "refused"),
    [
        (0.5, 0.4, 0.5, True),  # at the threshold
        (0.49, 0.1, 0.5, False),
        (0.2, 0.7, 0.2, True),  # the threshold alone decides, not the other token
        (0.2, 0.7, "compare", False),
        (0.3, 0.2, "compare", True),
        (0.3, 0.3, "compare", True),  # the released code has >=
        (0.0, 1.0, 0.01, False),
    ],
)
def test_S2_2_the_published_table_for_a_pair_of_tokens(refuse, respond, limit, refused):
    rule = FirstTokenRule(compare=limit == "compare", respond=RESPOND)
    limits = {"safety": 0.5 if limit == "compare" else limit}
    assert (rule.decide({"safety": refuse, RESPOND: respond}, limits).category == "safety") is refused
    # In the session: an alarm at the first step or none at all, whatever comes later.
    thresholds = Thresholds({"safety": limits["safety"], RESPOND: 1.0}, MonitorConfig("first"))
    session = Session(thresholds, Policy(first_token=rule, observe=True), ("safety", RESPOND))
    events = session.feed(Step(5, (refuse, respond))) + session.feed(Step(6, (1.0, 0.0)))
    assert [e.category for e in events if isinstance(e, Alarm)] == ["safety"] * refused


@settings(max_examples=300)
@given(logit, logit, st.lists(logit, min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_S2_2_the_threshold_rule_is_the_published_one(refuse, respond, words, threshold):
    p = softmax([refuse, respond, *words])
    if not close((p[0], threshold)):
        rule = FirstTokenRule(respond=RESPOND)
        assert ours(rule, [refuse], respond, words, threshold) == published([refuse], respond, words, threshold)


@settings(max_examples=300)
@given(logit, logit, st.lists(logit, min_size=1, max_size=5), st.sampled_from([1.0, 1.5, 2.0]))
def test_S2_2_compare_is_the_published_one_at_every_temperature(refuse, respond, words, temperature):
    """Though its temperature flattens a whole vocabulary, and ours classes: the order of two tokens is the same."""
    if close((refuse, respond)):
        return
    rule = FirstTokenRule(compare=True, respond=RESPOND, temperature=temperature)
    assert ours(rule, [refuse], respond, words, 0.5) == published([refuse], respond, words, -1, None, temperature)


@pytest.mark.parametrize(("p", "respond"), [(0.5, True), (0.4999, False), (0.9, True), (0.0, False)])
def test_S2_2_without_a_respond_token_the_absence_of_flags_is_compared(p, respond):
    rule = FirstTokenRule(compare=True)
    decision = rule.decide({"safety": p}, {})
    assert (decision.category == "safety") is respond and decision.limit == pytest.approx(1.0 - p)


@settings(max_examples=300)
@given(st.floats(0.001, 0.999), st.floats(0.01, 0.99), st.sampled_from([0.5, 1.5, 2.0, 4.0]), st.floats(-4, 4))
def test_S2_2_for_one_flag_temperature_and_bias_only_move_the_threshold(p, threshold, temperature, bias):
    def odds(x):
        return math.log(x / (1.0 - x))

    rule = FirstTokenRule(temperature=temperature, bias={"safety": bias})
    moved = temperature * odds(threshold) - bias
    if not math.isclose(odds(p), moved, abs_tol=1e-9):
        assert (rule.decide({"safety": p}, {"safety": threshold}).category == "safety") is (odds(p) > moved)


def test_S2_2_temperature_of_classes_and_of_a_vocabulary_agree_where_one_ordinary_token_has_all_the_rest():
    for refuse in (0.95, 0.8, 0.3):
        logits = [math.log(refuse), math.log(1.0 - refuse)]
        for temperature in (1.0, 1.5, 2.0):
            flags, _ = FirstTokenRule(temperature=temperature).classes({"safety": refuse})
            assert flags["safety"] == pytest.approx(softmax(logits, temperature)[0])
    # With many, a vocabulary's temperature takes more from the flag: where ours differs from the published rule.
    many = [math.log(0.8), *[math.log(0.2 / 50)] * 50]
    flags, _ = FirstTokenRule(temperature=2.0).classes({"safety": 0.8})
    assert flags["safety"] == pytest.approx(2 / 3) and softmax(many, 2.0)[0] < 0.3


@settings(max_examples=300)
@given(
    st.lists(logit, min_size=3, max_size=3, unique=True),
    logit,
    st.lists(logit, min_size=1, max_size=4),
    st.sets(st.integers(0, 2)),
    st.floats(0.01, 0.99),
)
def test_S2_3_categories_and_selection_are_the_published_rule(kinds, respond, words, selected, threshold):
    p = softmax([*kinds, respond, *words])
    if close((max(p[:3]), threshold), (max(p[:3]), p[3])):
        return
    expected = published(kinds, respond, words, threshold, selected)
    found = ours(
        FirstTokenRule(selected=tuple(KINDS[k] for k in selected), respond=RESPOND), kinds, respond, words, threshold
    )
    if int(np.argmax(p[:3])) not in selected and max(p[4:]) > max(p[:4]):
        # The model's own choice is an ordinary token, which no flag shows: ours compares category and respond.
        assert expected is None and (found is not None) == (max(p[:3]) > p[3])
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("probs", "selected", "category"),
    [
        ((0.6, 0.3, 0.0), None, "safety"),
        ((0.4, 0.35, 0.2), None, None),  # the likeliest misses its threshold; the others are not asked
        ((0.1, 0.3, 0.0), None, "incomplete"),  # its threshold is lower
        ((0.4, 0.1, 0.0), ("incomplete",), None),  # the likeliest is not selected: against responding, 0.4 < 0.5
        ((0.55, 0.1, 0.0), ("incomplete",), "safety"),
        ((0.1, 0.3, 0.0), ("safety",), None),
    ],
)
def test_S2_3_every_category_has_its_threshold_and_only_selected_ones_are_held_to_it(probs, selected, category):
    rule = FirstTokenRule(selected=selected)
    limits = {"safety": 0.5, "incomplete": 0.25, "unsupported": 0.01}
    assert rule.decide(dict(zip(KINDS, probs, strict=True)), limits).category == category
    # A threshold that comes with the rule stands in for the file's.
    own = replace(rule, thresholds=limits)
    assert own.decide(dict(zip(KINDS, probs, strict=True)), dict.fromkeys(KINDS, 0.99)).category == category


def test_S2_3_one_categorys_threshold_moves_no_other(capsys):
    rng = np.random.default_rng(4)
    rows = [dict(zip(KINDS, rng.dirichlet([0.3, 0.3, 0.3, 0.5])[:3], strict=True)) for _ in range(400)]

    def decided(limits):
        return [FirstTokenRule().decide(row, limits).category for row in rows]

    before = decided(dict.fromkeys(KINDS, 0.5))
    after = decided({"safety": 0.9, "incomplete": 0.5, "unsupported": 0.5})
    for kind in KINDS[1:]:
        assert [d == kind for d in before] == [d == kind for d in after]
    assert before.count("safety") > after.count("safety") > 0


def test_S2_3_a_halting_session_acts_on_the_category_that_is_decided_for_and_on_no_other():
    thresholds = Thresholds({"safety": 0.2, "incomplete": 0.2, "unsupported": 0.2}, MonitorConfig("first"))
    policy = Policy(actions={"incomplete": "continue"}, first_token=FirstTokenRule())
    session = Session(thresholds, policy, KINDS)
    assert session.feed(Step(5, (0.3, 0.5, 0.1))) == [
        Alarm(0, "incomplete", 0.5, 0.2, "continue"),
        Text(0, (5,), ""),
    ]
    assert session.feed(Step(6, (0.9, 0.9, 0.9))) == [Text(1, (6,), "")]
    assert session.finish("stop") == [Done(2, "stop")]
    # Without the rule each category is judged by itself, and the severest action wins.
    plain = Session(thresholds, replace(policy, first_token=None), KINDS)
    assert plain.feed(Step(5, (0.3, 0.5, 0.1)))[-1] == Halt(0, "alarm", "safety")


@settings(max_examples=300)
@given(st.lists(logit, min_size=2, max_size=2), logit, st.lists(logit, min_size=1, max_size=5), st.floats(-6, 6))
def test_S2_4_a_bias_on_a_category_is_the_bias_on_its_logit(kinds, respond, words, bias):
    """Exactly, though only flags are seen: what is left of the softmax is scaled as one."""
    biased = softmax([kinds[0] + bias, kinds[1], respond, *words])
    p = softmax([*kinds, respond, *words])
    names = (*KINDS[:2], RESPOND)
    flags, rest = FirstTokenRule(bias={"safety": bias}).classes(dict(zip(names, p, strict=False)))
    assert [*flags.values()] == pytest.approx(biased[:3], rel=1e-6, abs=1e-9)
    assert rest == pytest.approx(sum(biased[3:]), rel=1e-6, abs=1e-9)


def test_S2_4_a_bias_changes_what_is_refused_and_how_often():
    row = {"safety": 0.3, "incomplete": 0.4, "unsupported": 0.0}
    limits = dict.fromkeys(KINDS, 0.5)
    assert FirstTokenRule().decide(row, limits).category is None
    assert FirstTokenRule(bias={"safety": 2.0}).decide(row, limits).category == "safety"
    assert FirstTokenRule(bias={"incomplete": 2.0}).decide(row, limits).category == "incomplete"
    assert FirstTokenRule(bias={"safety": -9.0, "incomplete": -9.0}).decide(row, limits).category is None


def test_S2_5_near_misses_are_learnt_and_measured_as_answers(tmp_path):
    """The nano recipe's rows: refusals carry their category, contrast rows none, harmful answers are left out."""
    nano = script(ROOT / "recipes" / "papers" / "refusal-tokens" / "nano.py")
    rows = nano_rows("train", 400)
    kinds = {variant: nano.labelled(rows, variant) for variant in nano.VARIANTS}
    for variant, found in kinds.items():
        by = {name: {row.category for row in found if nano.kind(row) == name} for name in ("refusal", "scary", "plain")}
        answered = {"respond"} if variant == "pair" else {None}
        assert by["plain"] == answered and by["scary"] == (set() if variant == "no-contrast" else answered)
        assert by["refusal"] == {"refusal"} if variant != "kinds" else len(by["refusal"]) == 6
        harmful = {row.id for row in rows if row.harmful}
        assert harmful and not harmful & {row.id for row in found}
    # Sets that say so in a label, as CoCoNot's contrast part does:
    said = [
        {"prompt": "How do I kill a process?", "response": "With kill.", "label": "contrast", "category": "safety"},
        {"prompt": "How do I kill Bob?", "response": "I will not say.", "label": "refused", "category": "safety"},
    ]
    read = load_rows(said, labels={"contrast": None, "refused": "safety"}).rows
    assert [row.category for row in read] == [None, "safety"]
    # A near-miss counts as an answer in calibration: thresholds go above what it reaches.
    quiet, near, refused = [[(0.01,)]] * 150, [[(0.6,)]] * 50, [[(0.9,)]] * 20
    spec = FlagSpec.of("safety")
    with_contrast, without = (
        calibrate(
            harmless,
            spec,
            target_fpr=0.05,
            monitor=MonitorConfig("first"),
            harmful=refused,
            groups=[str(i) for i in range(len(harmless))],
            held_out=0.0,
        ).thresholds.values["safety"]
        for harmless in (quiet + near, quiet)
    )
    assert without < 0.6 < with_contrast <= 0.9
