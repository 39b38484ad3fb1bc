"""S0.5 to S0.12: the marker's threshold, log, override, replacement and grades, as the server has them."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import httpx
import openai
import pytest
from marker_world import ASKED, RECIPE, SAMPLING, SEVERITY, ask, choice, entries, made, served, world
from running import MODEL, body_of

from redflag import cli
from redflag.backends import Sampling
from redflag.cli import parse
from redflag.data.rows import Row, write_rows
from redflag.errors import RedflagError
from redflag.lab.nano.rows import nano_rows
from redflag.scoring.marker import LocalSource, MarkerReader
from redflag.scoring.prompts import score_prompts
from redflag.scoring.recording import Recording
from redflag.trace import Alarm, Done, Halt, Step, Text
from redflag.training import train
from redflag.watching.policy import Policy
from redflag.watching.session import Session
from redflag.watching.thresholds import Thresholds

__all__ = ["made", "world"]


@pytest.mark.parametrize(("threshold", "verdict"), [(0.29, "halted"), (0.31, "completed")])
def test_S0_5_the_threshold_decides_and_no_draw_does(world, threshold, verdict):
    """p(marker) is 0.3: were it sampled, three answers in ten would stop. Here all do, or none."""
    world.likely(mild=0.3)
    guard = world.guard(mild=threshold)
    first, ends = set(), set()
    for seed in range(40):
        result = guard.generate(ASKED, Sampling(max_new_tokens=1, temperature=2.0, seed=seed))
        ends.add(result.verdict)
        first.add(result.trace.token_ids[0])
        assert any(isinstance(event, Text) for event in result.events) == (verdict == "completed")
    assert ends == {verdict} and len(first) > 10


def test_S0_6_what_was_likely_and_went_on_is_logged_by_user(world, tmp_path):
    world.likely(mild=0.4)  # more than half of the threshold, and below it
    log = tmp_path / "audit.jsonl"
    with served(world, log, mild=0.5, severe=0.9) as server:
        assert choice(ask(server, user="u-17"))[1] in ("stop", "length")
        world.likely(mild=0.05)
        assert choice(ask(server, user="u-18"))[1] in ("stop", "length")
    with served(world, log, Policy(observe=True), mild=0.01, severe=0.9) as server:
        world.likely(mild=0.4)
        assert choice(ask(server, user="u-19"))[1] in ("stop", "length")
    found = {entry["user"]: entry for entry in entries(log)}
    assert set(found) == {"u-17", "u-19"}
    assert found["u-17"]["near"] == ["mild"] and found["u-17"]["alarms_overridden"] == 0
    assert found["u-19"]["alarms_overridden"] >= 1
    assert found["u-17"]["categories"]["mild"]["peak"] > 0.399


def test_S0_6_the_log_names_users_the_severest_first(world, tmp_path, capsys):
    log = tmp_path / "audit.jsonl"
    for user, p in (("u-1", 0.3), ("u-2", 0.45)):
        world.likely(mild=p)
        with served(world, log, mild=0.5, severe=0.9) as server:
            ask(server, user=user)
    assert cli.main(["audit-log", str(log), "--json"]) == 0
    told = capsys.readouterr().out
    assert 0 < told.index("u-2") < told.index("u-1")


def test_S0_7_an_override_gives_the_answer_that_the_model_has_without_its_marker(world, tmp_path):
    """The marker stays banned, so what is read is what the model does when it may not refuse by it."""
    world.likely(mild=0.98)
    log = tmp_path / "audit.jsonl"
    with served(world, log, severe=0.9) as server:
        watched, overridden = ask(server), ask(server, override="red team, week 12")
        assert choice(watched) == ("", "content_filter")
        text, end = choice(overridden)
    unwatched = world.guard(Policy(observe=True), severe=0.9).generate(ASKED, SAMPLING)
    assert text == unwatched.text != "" and end in ("stop", "length")
    assert world.spec.strip(text) == text
    override, response = entries(log)
    assert (override["kind"], response["kind"]) == ("override", "response")
    assert override["reason"] == response["reason"] == "red team, week 12"
    assert response["overridden"] and response["alarms_overridden"] >= 1
    assert text not in log.read_text()


def test_S0_8_only_a_trusted_user_overrides_and_only_with_a_reason(world, tmp_path):
    world.likely(mild=0.98)
    log = tmp_path / "audit.jsonl"
    with served(world, log, severe=0.9) as server:
        assert ask(server, override="", user="u-5").status_code == 400
        assert ask(server, override="defensive work", key="guessed", user="u-5").status_code == 403
        headers = {"X-Redflag-Override": "defensive work"}
        body = body_of("/v1/chat/completions", user="u-5")
        assert httpx.post(server.url + "/v1/chat/completions", json=body, headers=headers).status_code == 403
        assert not entries(log), "what was refused has overridden nothing"
        assert choice(ask(server, override="defensive work", user="u-5"))[1] in ("stop", "length")
        assert choice(ask(server, user="u-5")) == ("", "content_filter"), "an override is that of one request"
    assert [(entry["user"], entry["overridden_by"]) for entry in entries(log)] == [("u-5", "operator")] * 2


@pytest.mark.parametrize("decoy", [False, True], ids=["replacement", "decoy"])
def test_S0_11_an_alarm_is_answered_with_the_operators_text_and_a_decoy_shows_no_mark(world, tmp_path, decoy):
    world.likely(mild=0.98)
    policy = Policy(default="replace", replacement="the cat sat on a mat", decoy=decoy)
    with served(world, tmp_path / "audit.jsonl", policy, severe=0.9) as server:
        text, end = choice(ask(server))
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        chunks = list(client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=6, stream=True))
        client.close()
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    ends = {chunk.choices[0].finish_reason for chunk in chunks if chunk.choices} - {None}
    assert text == streamed == "the cat sat on a mat"
    assert {end} == ends == ({"stop"} if decoy else {"content_filter"})
    # The operator's trace says what happened, decoy or not.
    last = server.traces[-1].events[-1]
    assert isinstance(last, Halt) and last.category == "mild" and last.text == "the cat sat on a mat"


GRADES = [  # p(mild), p(severe) -> category and action of the alarm
    (0.45, 0.005, None),
    (0.55, 0.005, ("mild", "replace")),
    (0.45, 0.02, ("severe", "halt")),
    (0.001, 0.011, ("severe", "halt")),
    (0.6, 0.3, ("severe", "halt")),
]


@pytest.mark.parametrize(("mild", "severe", "expected"), GRADES)
def test_S0_12_grades_of_severity_have_their_own_thresholds_and_actions(world, mild, severe, expected):
    world.likely(mild=mild, severe=severe)
    policy = Policy(actions={"mild": "replace", "severe": "halt"}, replacement="I would rather not.")
    result = world.guard(policy).generate(ASKED, Sampling(max_new_tokens=1, seed=0))
    last = result.events[-1]
    if expected is None:
        assert isinstance(last, Done) and not [e for e in result.trace.events if isinstance(e, Alarm)]
        return
    category, action = expected
    assert isinstance(last, Halt)
    alarms = {(event.category, event.action) for event in result.trace.events if isinstance(event, Alarm)}
    assert (category, action) in alarms
    assert last.text == ("I would rather not." if action == "replace" else "")
    assert result.text == ""


def test_S0_12_markers_of_ordinary_tokens_are_grades_as_well(world, tmp_path):
    """Two markers, 50% and 1%: the rows of `score --prompts --marker` are judged by thresholds of their own."""
    reader = MarkerReader(LocalSource(world.model), world.tokenizer, ["SO", "NO"])
    (so, o), (no, same) = reader.ids
    assert o == same and so != no
    thresholds = Thresholds(values=dict(zip(reader.markers, SEVERITY.values(), strict=True)))
    rows = [Row([{"role": "user", "content": word}], id=word) for word in ("rain", "cat")]
    policy = Policy(actions={"SO": "continue", "NO": "halt"})
    for likely, alarmed in ((so, set()), (no, {("NO", "halt")})):  # the one that is gets about a quarter
        world.bias.zero_()
        world.bias[[likely, o]] = 30.0
        recording = Recording.of(reader.markers, score_prompts(reader, world.tokenizer, reader.spec, rows))
        assert ((recording.probs > 0.1) & (recording.probs < 0.45)).any(axis=1).all()
        for i in range(len(rows)):
            events = Session(thresholds, policy, reader.markers).feed(Step(0, tuple(recording.steps(i)[0].tolist())))
            assert {(event.category, event.action) for event in events if isinstance(event, Alarm)} == alarmed


@pytest.fixture(scope="module")
def measure() -> Any:
    found = importlib.util.spec_from_file_location("measure_markers", RECIPE / "measure.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_S0_9_S0_10_the_recipe_tells_refusals_from_answers_and_counts_them(measure, tmp_path):
    """What its figures rest on: the judge against the generator's own labels, the variance and the bound by hand."""
    rows = nano_rows("test", 400, 5)
    verdicts = [(row.source in measure.REFUSED, measure.refuses(row.response)) for row in rows if row.source]
    asked = [pair for row, pair in zip(rows, verdicts, strict=True) if row.source in measure.ASKED_HARM]
    assert len(asked) > 80 and all(truth == said for truth, said in asked)
    assert sum(said for truth, said in verdicts if not truth) < 0.03 * len(rows)
    scored = [
        {"source": f"wordings:{kind}", "group": group, "flag_probs": [[p]], "peak": [p], "category": None}
        for kind in ("harmful", "harmless")
        for group, p in (("a", 0.2), ("a", 0.4), ("b", 0.6), ("b", 0.6))
    ]
    scored += [{**scored[0], "source": "nano:refusal", "category": "refusal", "peak": [0.9]}]
    scored += [{**scored[0], "source": "nano:plain", "peak": [0.1]}]
    found = measure.consistency(scored)
    assert found["variance_p"] == pytest.approx(0.02 / 2) and found["auroc"] == 1.0
    gap = math.log(0.4 / 0.6) - math.log(0.2 / 0.8)
    assert found["variance_log_odds"] == pytest.approx(gap**2 / 2 / 2)
    rates = [{"p": 0.5, "refused": 10, "harmful": True}, {"p": 0.9, "refused": 4, "harmful": True}]
    rates += [{"p": 0.0, "refused": 0, "harmful": False}]
    bound = measure.bound_of(rates)
    assert (bound["within"], bound["below"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert bound["gap"] == pytest.approx((0.0 - 0.7) / 2) and bound["mean_rate_harmless"] == 0.0
    arguments, config = parse(train, ["--config", str(RECIPE / "nano.yaml"), "--output_dir", str(tmp_path)], "train")
    assert config.placement == "first" and arguments.categories == ["refusal"]


def test_rows_without_a_response_are_prompts_only_where_that_is_asked_for(tmp_path):
    from redflag.data.rows import load_rows

    path = write_rows(tmp_path / "rows.jsonl", [Row(ASKED, "refusal", id="a")])
    with pytest.raises(RedflagError, match="no assistant turn"):
        load_rows(path)
    (row,) = load_rows(path, unanswered="keep").rows
    assert row.messages == ASKED and row.category == "refusal"
    with pytest.raises(RedflagError, match="unanswered must be one of stop, keep"):
        load_rows(path, unanswered="yes")  # type: ignore[arg-type]
