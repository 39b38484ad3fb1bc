"""Prompts judged before the answer: by thresholds of their own, on the probabilities before the first token."""

from __future__ import annotations

import dataclasses
import math

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import MODEL, ROUTES, body_of, engine, running

from redflag.api.wire import REFUSAL
from redflag.backends import Sampling
from redflag.backends.load import load_flagged
from redflag.calibrating.calibrate import CalibrateArguments, calibrate_model
from redflag.calibrating.guarantee import fit_thresholds
from redflag.data.rows import Row, load_rows, write_rows
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.guard.options import GuardOptions
from redflag.scoring.prompts import FlagReader, prompt_of, score_prompts
from redflag.trace import Alarm, Done, Halt, Step, Text
from redflag.watching.policy import Policy, Reflect
from redflag.watching.session import Session
from redflag.watching.thresholds import PROMPT_THRESHOLDS_FILE, Thresholds

REFLECT = {"default": "reflect", "reflect": Reflect(words=("yes", "no"))}  # there is no answer to reflect on
ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def prompt(thresholds) -> Thresholds:
    """An alarm from 0.2 on, where the answer's begins at 0.5."""
    return dataclasses.replace(thresholds, values={"harm": 0.2, "theft": 0.3})


@pytest.mark.parametrize(
    ("first", "policy", "shown", "end"),
    [
        ((0.19, 0.0), {}, "abcd", Done(5, "stop")),
        ((0.2, 0.0), {}, "", Halt(0, "alarm", "harm")),
        ((0.0, 0.29), {}, "abcd", Done(5, "stop")),
        ((0.0, 0.3), {}, "", Halt(0, "alarm", "theft")),
        ((0.9, 0.9), {}, "", Halt(0, "alarm", "harm")),
        ((0.2, 0.0), {"observe": True}, "abcd", Done(5, "stop")),
        ((0.2, 0.0), {"actions": {"harm": "continue"}}, "abcd", Done(5, "stop")),
        ((0.2, 0.3), {"actions": {"harm": "continue"}}, "", Halt(0, "alarm", "theft")),
        ((0.2, 0.0), {"default": "replace", "replacement": "No."}, "", Halt(0, "alarm", "harm", text="No.")),
        (
            (0.2, 0.0),
            {"default": "reflect", "reflect": Reflect(words=("yes", "no"))},
            "",
            Halt(0, "alarm", "harm"),
        ),  # there is no answer to reflect on
        ((0.2, 0.0), {"default": "force"}, "", Halt(0, "alarm", "harm")),
        ((0.2, 0.0), {"release": "end"}, "", Halt(0, "alarm", "harm")),
        ((math.nan, 0.0), {}, "", None),
    ],
)
def test_a_prompt_is_halted_before_its_answer(first, policy, shown, end, guard_of, script, prompt):
    guard = guard_of(script("abcd", {0: first}), Policy(prompt=prompt, **policy))
    made = guard.generate(ASK)
    assert made.text == shown
    if end is None:
        assert made.trace.end.reason == "fault"
        return
    assert made.trace.end == end
    alarms = [event for event in made.events if isinstance(event, Alarm)]
    assert all(event.position == 0 for event in alarms) and bool(alarms) == (max(first) >= 0.2 and first[1] != 0.29)
    if isinstance(end, Halt):
        assert made.trace.generated == 1 and not made.trace.released


def test_later_steps_are_the_answers_alone(guard_of, script, prompt):
    steps = script("abcd", {0: (0.1, 0.1), 2: (0.4, 0.4), 3: (0.5, 0.0)})
    made = guard_of(steps, Policy(prompt=prompt)).generate(ASK)
    assert made.text == "abc" and made.trace.end == Halt(3, "alarm", "harm")


PROBS = st.tuples(st.floats(0, 1), st.floats(0, 1))


@settings(max_examples=200)
@given(st.lists(PROBS, min_size=1, max_size=6), st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_nothing_is_released_of_a_prompt_that_reaches_its_threshold(probs, limits):
    names = ("harm", "theft")
    prompt = Thresholds(dict(zip(names, limits, strict=True)))
    session = Session(Thresholds.manual(0.5, names), Policy(prompt=prompt), names, lambda token: "x")
    plain = Session(Thresholds.manual(0.5, names), Policy(), names, lambda token: "x")
    reached = any(p >= limit for p, limit in zip(probs[0], limits, strict=True))
    for step in probs:
        if not session.finished:
            session.feed(Step(7, step))
        if not plain.finished:
            plain.feed(Step(7, step))
    if reached:
        assert session.finished and not session.released
        assert not any(isinstance(event, Text) for event in session.trace.events)
    else:
        assert session.trace.events == plain.trace.events, "otherwise nothing changes"


@pytest.mark.parametrize("change", [{"run_id": "other"}, {"template_hash": "other"}, {"logprob_mode": "processed"}])
def test_thresholds_of_another_model_are_refused(change, guard_of, script, prompt):
    with pytest.raises(RedflagError, match="calibrated for"):
        guard_of(script("a"), Policy(prompt=dataclasses.replace(prompt, **change)))


@pytest.mark.parametrize("route", [*ROUTES, "/v1/responses", "/v1/messages"])
def test_the_server_says_so_as_of_every_halt(route, tokenizer, spec, thresholds, script, prompt):
    _, turns = engine(script("abcd", {0: (0.3, 0.0)}), tokenizer.eos_token_id)
    guard = Guard(turns, tokenizer, spec, thresholds, Policy(prompt=prompt))
    body = {"model": MODEL, "input": "hello"} if "responses" in route else body_of("chat" if "v1/m" in route else route)
    with running(guard) as server:
        answer = httpx.post(server.url + route, json={**body, "max_tokens": 9})
        assert answer.status_code == 200
        said = answer.json()
        assert said["redflag"] == {"verdict": "halted", "reason": "alarm", "category": "harm"}
        assert (REFUSAL in answer.text) == (route != "/v1/completions")
        assert server.ends() == {"halted"}


# Calibration, on the nano world


@pytest.fixture(scope="module")
def calibrated(nano, tmp_path_factory):
    """A copy of the nano model with prompt thresholds, the rows that set them, and what calibration said."""
    import shutil

    folder = tmp_path_factory.mktemp("prompts")
    model = shutil.copytree(nano / "model", folder / "model")
    rows = [
        Row(row.messages[:-1] if number % 2 else row.messages, row.category, group=row.group)
        for number, row in enumerate(load_rows(nano / "rows" / "calibration.jsonl").rows[:260])
    ]
    write_rows(folder / "rows.jsonl", rows)
    arguments = CalibrateArguments(
        model=str(model), input=str(folder / "rows.jsonl"), prompts=True, target_fpr=0.05, held_out=0.0, device="cpu"
    )
    return model, rows, calibrate_model(arguments)


def test_calibration_measures_what_scoring_and_a_guard_measure_before_the_first_token(calibrated, nano):
    model, rows, found = calibrated
    assert (model / "thresholds.json").read_bytes() == (nano / "model" / "thresholds.json").read_bytes()
    saved = Thresholds.load(model, PROMPT_THRESHOLDS_FILE)
    assert saved == found.thresholds and saved.monitor.aggregation == "first"
    backend, tokenizer, spec = load_flagged(model, "cpu")
    scored = list(score_prompts(FlagReader(backend, spec), tokenizer, spec, rows))
    harmless = [item["peak"] for item, row in zip(scored, rows, strict=True) if not row.harmful]
    assert list(saved.values.values()) == pytest.approx(list(fit_thresholds(harmless, 0.05)), rel=1e-5)
    assert saved.sample_size == len(harmless)

    policy = Policy(prompt=saved, observe=True)
    guard = Guard.from_pretrained(model, policy, device="cpu")
    halting = GuardOptions(model=str(model), judge_prompt=True, device="cpu").open_guard(Policy(), None)
    halted = 0
    for row, item in list(zip(rows, scored, strict=True))[:60]:
        prompt = prompt_of(row)
        trace = guard.generate(prompt, Sampling(max_new_tokens=1, temperature=0.0)).trace
        assert trace.flag_probs[0] == pytest.approx(item["peak"], abs=1e-5)
        near = any(abs(p - v) < 1e-4 for p, v in zip(item["peak"], saved.values.values(), strict=True))
        alarms = any(p >= v for p, v in zip(item["peak"], saved.values.values(), strict=True))
        made = halting.generate(prompt, Sampling(max_new_tokens=4, temperature=0.0))
        assert near or not alarms or (made.verdict == "halted" and made.text == "")
        halted += alarms
    assert 0 < halted < 60, "prompts of both kinds"


def test_options_that_cannot_be_carried_out_are_refused(nano, calibrated, tmp_path):
    with pytest.raises(RedflagError, match=r"prompt_thresholds\.json does not exist.*--prompts"):
        GuardOptions(model=str(nano / "model"), judge_prompt=True, device="cpu").open_guard(Policy(), None)
    model, _, _ = calibrated
    rows = str(tmp_path / "rows.jsonl")
    write_rows(rows, [Row([{"role": "user", "content": "a"}], None)])
    with pytest.raises(RedflagError, match="must be left out with prompts"):
        calibrate_model(CalibrateArguments(model=str(model), input=rows, prompts=True, aggregation="ema"))


def test_moderations_judge_prompts_then(calibrated, tmp_path):
    from redflag.backends.turns import Turns
    from redflag.server.access import Limits

    model, rows, found = calibrated
    backend, tokenizer, spec = load_flagged(model, "cpu")
    scored = list(score_prompts(FlagReader(backend, spec), tokenizer, spec, rows[:30]))
    guard = Guard(Turns(backend), tokenizer, spec, Thresholds.load(model), Policy(prompt=found.thresholds))
    headers = {"x-api-key": "operator-key-0123456789"}
    with running(guard, Limits(MODEL, operator_key=headers["x-api-key"])) as server:
        for row, item in zip(rows, scored, strict=False):
            wanted = {
                name: p >= found.thresholds.values[name] for name, p in zip(spec.categories, item["peak"], strict=True)
            }
            body = {"messages": prompt_of(row)}
            [result] = httpx.post(server.url + "/v1/moderations", json=body, headers=headers).json()["results"]
            assert result["categories"] == wanted and result["flagged"] == any(wanted.values())
            asked = {"input_type": "request", "structured_messages": prompt_of(row), "texts": ["..."]}
            answer = httpx.post(server.url + "/beta/litellm_basic_guardrail_api", json=asked, headers=headers).json()
            assert answer["action"] == ("BLOCKED" if any(wanted.values()) else "NONE")
            alone = {"input_type": "request", "texts": [prompt_of(row)[-1]["content"]]}
            httpx.post(server.url + "/beta/litellm_basic_guardrail_api", json=alone, headers=headers).raise_for_status()
