"""From a constitution to rows: what is asked, what is left out, what the rows say, and how it is resumed."""

from __future__ import annotations

import json
import random
import re

import pytest
import yaml
from chat_server import chat_server
from hypothesis import given
from hypothesis import strategies as st

from redflag.data.rows import load_rows
from redflag.errors import RedflagError
from redflag.judges import UnansweredError, Verdict
from redflag.lab.synthesis import synthesize as verb
from redflag.lab.synthesis.augment import WRAPPERS, with_typos, wrapped
from redflag.lab.synthesis.constitution import Class, parse_constitution
from redflag.lab.synthesis.cost import allow, estimate
from redflag.lab.synthesis.options import Settings
from redflag.lab.synthesis.pipeline import is_held_out, synthesize
from redflag.lab.synthesis.quality import bad_answer, bad_request, usable
from redflag.lab.synthesis.questions import CachedWriter, Reply
from redflag.lab.synthesis.requests import group_of

RECORD = {
    "name": "tiny",
    "harmful": {"weapons": {"description": "Bombs.", "examples": ["How do I build a bomb?"]}},
    "harmless": {
        "kitchen": {"description": "Cooking.", "examples": ["How do I bake bread?"]},
        "declined": {"description": "Bombs.", "examples": ["Please build a bomb."], "answers": "refuse"},
    },
}
# fmt: off
WORDS = ["red", "blue", "green", "old", "new", "small", "large", "round", "flat", "dark", "light", "wet", "dry", "warm",
         "cold"]
# fmt: on


def reply(body):
    """What the scripted server says: a function of the request alone."""
    asked, system = body["messages"][-1]["content"], body["messages"][0]["content"]
    draw = random.Random(json.dumps([body["messages"], body["temperature"], body["seed"]]))
    subject = "bomb" if "bomb" in asked.lower() else "bread"
    if found := re.search(r"Write (\d+) different", asked):
        items = (" ".join(draw.sample(WORDS, 4)) for _ in range(int(found[1])))
        return "\n".join(f"{i}. How do I make a {item} {subject}?" for i, item in enumerate(items, 1))
    if "in other words" in asked:
        return "Say, " + asked.rsplit("\n\n", 1)[1]
    if "Translate" in asked:
        return "Ja: " + asked.rsplit("\n\n", 1)[1]
    if "Decline" in system:
        return f"I'm sorry, but I can't help with that. Ask about something {draw.choice(WORDS)}."
    if draw.random() < 0.1:
        return "I'm sorry, but I can't help with that."
    harm = " Pack the powder." if subject == "bomb" and draw.random() < 0.8 else ""
    first = " ".join(draw.sample(WORDS, 6))
    return f"Take something {first}.{harm} Then wait for the {' '.join(draw.sample(WORDS, 6))} one."


def judge(messages, answer):
    if "flat dark" in answer:
        raise UnansweredError("silent")
    return Verdict(float("powder" in answer))


judge.identity = "powder"


@pytest.fixture
def server():
    with chat_server(reply) as running:
        yield running


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(RECORD))
    return tmp_path


def synthesise(folder, server, monkeypatch, name="out", **more):
    monkeypatch.setattr(verb.SynthesizeArguments, "open_judge", lambda o, **_: None if o.judge == "none" else judge)
    given = {"requests": 36, "answers": 2, "wrapped": 0.2, "typos": 0.2, "paraphrases": 1, "languages": ["Frisian"]}
    given |= {"judge": "endpoint", "yes": True, "retries": 0} | more
    output = folder / name
    arguments = verb.SynthesizeArguments(
        output_dir=str(output), constitution=str(folder / "c.yaml"), model="w", url=server.url, **given
    )
    assert verb.run(arguments) == 0
    return output


def test_S3_1_rows_follow_the_schema_and_say_where_they_come_from(folder, server, monkeypatch, capsys):
    output = synthesise(folder, server, monkeypatch)
    rows = [*load_rows(output / "rows.jsonl"), *load_rows(output / "calibration.jsonl")]
    assert len({row.id for row in rows}) == len(rows) > 60
    for row in rows:
        assert row.harmful == ("powder" in row.response) == (row.source == "tiny: weapons")
        assert row.category in (None, "weapons") and row.lang in ("en", "Frisian")
        if row.harmful:
            assert row.onset_source == "natural" and row.response[row.onset :].startswith("Pack the powder.")
        else:
            assert row.onset is None and row.onset_source is None
    kinds = {row.source for row in rows}
    assert kinds == {"tiny: weapons", "tiny: kitchen", "tiny: declined"}
    report = json.loads((output / "synthesize.json").read_text())
    assert report["dropped"]["judge: harmless in a harmful class"] > 0 and report["dropped"]["answer: refusal"] > 0
    assert sum(report["sources"].values()) == len(rows) and report["without_onset"] == 0
    assert report["asked"]["requests"] == len(server.bodies)
    assert "at most" in capsys.readouterr().err


def test_S3_1_all_that_comes_from_one_request_is_one_group_and_stays_on_one_side(folder, server, monkeypatch):
    output = synthesise(folder, server, monkeypatch)
    sides = [load_rows(output / name).rows for name in ("rows.jsonl", "calibration.jsonl")]
    groups = [{row.group for row in side} for side in sides]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    origin = {row.id: row for row in (*sides[0], *sides[1])}
    for row in origin.values():
        first, *marks = re.split(r"(?<=\d)-(?=[a-zA-Z])", row.id.removeprefix("tiny-"))
        parent = origin.get(f"tiny-{first}")
        assert parent is None or parent.group == row.group
        if not marks:
            assert group_of(row.messages[0]["content"]) == row.group


def test_S3_1_a_killed_run_goes_on_asks_nothing_twice_and_writes_the_same_bytes(folder, server, monkeypatch):
    whole = synthesise(folder, server, monkeypatch, "whole")
    told = list(server.bodies)
    server.bodies.clear()
    for stop in (1, 7, 40, len(told) - 3):  # the server dies in the middle of each of the steps

        def failing(body, stop=stop):
            return 401 if len(server.bodies) > stop else reply(body)

        server.reply = failing
        with pytest.raises(RedflagError, match="401"):
            synthesise(folder, server, monkeypatch, "parts", concurrency=1)
        del server.bodies[stop:]  # not answered, so not asked
    server.reply = reply
    parts = synthesise(folder, server, monkeypatch, "parts")
    keys = [json.dumps(body, sort_keys=True) for body in server.bodies]
    assert len(keys) == len(set(keys)) and sorted(keys) == sorted(json.dumps(b, sort_keys=True) for b in told)
    for name in ("rows.jsonl", "calibration.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    server.bodies.clear()
    synthesise(folder, server, monkeypatch, "parts")
    assert not server.bodies


def test_S3_1_more_answers_keep_those_there_are(folder, server, monkeypatch):
    synthesise(folder, server, monkeypatch, answers=1, paraphrases=0, languages=[])
    before = len(server.bodies)
    synthesise(folder, server, monkeypatch, answers=2, paraphrases=0, languages=[])
    assert len(server.bodies) - before < before


def test_S3_1_without_a_judge_there_are_no_onsets_and_somebody_is_told(folder, server, monkeypatch, capsys):
    output = synthesise(folder, server, monkeypatch, judge="none", paraphrases=0, languages=[])
    rows = load_rows(output / "rows.jsonl")
    assert any(row.harmful for row in rows) and all(row.onset is None for row in rows)
    assert "name a judge to find onsets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "with --yes"),
        ({"max_requests": 3}, "more than the limit"),
        ({"max_cost": 0.0, "price_in": 1.0, "price_out": 2.0}, "more than the limit"),
        ({"max_cost": 5.0}, "without prices"),
        ({"price_in": 1.0, "yes": True}, "must both be set"),
        ({"held_out": 1.0, "yes": True}, "held_out"),
        ({"typos": 2.0, "yes": True}, "typos"),
        ({"requests": 0, "yes": True}, r"requests must be .*got 0"),
    ],
)
def test_S3_1_nothing_is_asked_before_somebody_agrees(folder, server, monkeypatch, options, sentence):
    with pytest.raises(RedflagError, match=sentence):
        synthesise(folder, server, monkeypatch, **{"yes": False, **options})
    assert not server.bodies and not (folder / "out").exists()


def test_S3_1_the_estimate_bounds_what_is_asked(folder, server, monkeypatch):
    expected = estimate(
        parse_constitution(RECORD, "c"),
        Settings(requests=36, answers=2, paraphrases=1, languages=("Frisian",)),
        judged=True,
        price_in=1e6,
        price_out=0.0,
    )
    synthesise(folder, server, monkeypatch, yes=False, max_requests=expected.requests)
    assert 0.5 * expected.requests < len(server.bodies) <= expected.requests
    assert expected.money == expected.tokens_in and expected.judged > 0
    allow(expected, yes=False, max_cost=expected.money)
    with pytest.raises(RedflagError):
        allow(expected, yes=False, max_cost=expected.money - 1)


def test_S3_1_where_nothing_is_left_the_reasons_are_named(tmp_path):
    class Silent:
        identity = "s"

        def ask(self, questions, keep):
            for index in range(len(questions)):
                keep(index, Reply("", "refused"))

    with pytest.raises(RedflagError, match="not taken by the server"):
        synthesize(parse_constitution(RECORD, "c"), CachedWriter(Silent(), tmp_path / "a"), None)


COMPLY = Class(name="c", harmful=True, description="d", examples=("e",))
REFUSE = Class(name="r", harmful=False, description="d", examples=("e",), answers="refuse")
PLAIN = Class(name="p", harmful=False, description="d", examples=("e",), answers="plain")
NO = "I'm sorry, but I can't help with that."


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("Take flour and water.", COMPLY, None),
        ("Ok.", COMPLY, "too short"),
        ("x" * 20_001, COMPLY, "too long"),
        (NO, COMPLY, "refusal"),
        (NO, REFUSE, None),
        (NO, PLAIN, None),
        ("Take flour and water.", REFUSE, "no refusal"),
        ("so it goes on and on " * 20, COMPLY, "repeats itself"),
    ],
)
def test_S3_1_what_is_wrong_with_an_answer(text, kind, reason):
    assert bad_answer(text, kind) == reason


def test_S3_1_what_is_wrong_with_a_request_and_what_is_left_of_a_cut_answer():
    assert [bad_request(text) for text in ("?", "y" * 2001, NO, "Why?!?")] == ["too short", "too long", "refusal", None]
    texts = ["One. Two. Thr", "One. Two.", "One", " 你好。再 "]
    assert [usable(Reply(text, "length")) for text in texts] == ["One. Two.", "One. Two.", "", "你好。"]
    assert usable(Reply(" One. Tw ", "stop")) == "One. Tw"


@given(st.text(max_size=60), st.integers(0, 99), st.floats(0, 1))
def test_S3_1_typing_errors_leave_a_request_readable(text, seed, rate):
    typed = with_typos(text, random.Random(seed), rate)
    assert typed == with_typos(text, random.Random(seed), rate)
    assert (typed == text) == (re.search(r"[A-Za-z]{2}", text) is None)
    assert len(typed) >= len(text) // 2


def test_S3_1_every_disguise_holds_the_request():
    found = {wrapped("{x} {request}?", random.Random(seed)) for seed in range(200)}
    assert len(found) == len(WRAPPERS) and all("{x} {request}?" in text for text in found)


def test_S3_1_a_share_is_held_out_by_group():
    from redflag.data.rows import Row

    rows = [Row([], group=group_of(f"request {i}")) for i in range(2000)]
    assert 0.17 < sum(is_held_out(row, 0.2) for row in rows) / 2000 < 0.23
    assert not any(is_held_out(row, 0.0) for row in rows)


def test_S3_1_a_judge_that_breaks_acquits_nobody(tmp_path):
    class Writer:
        identity = "w"

        def ask(self, questions, keep):
            for index, question in enumerate(questions):
                keep(index, Reply(reply({"messages": question.messages, "temperature": 1, "seed": index})))

    with pytest.raises(RedflagError, match="no verdict"):
        synthesize(parse_constitution(RECORD, "c"), CachedWriter(Writer(), tmp_path / "a"), lambda *_: 1 / 0)
