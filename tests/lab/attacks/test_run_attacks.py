"""Attacks on disk: killed anywhere, they end as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from attacking import HARM, alarm_at, make_row, make_target

from redflag.errors import RedflagError
from redflag.lab.attacks.judging import entries, judge_attempts
from redflag.lab.attacks.prefill import Prefill
from redflag.lab.attacks.run_attacks import (
    ATTACKS,
    NANO_OPTIONS,
    OUTSIDE,
    make_attacks,
    named_rows,
    record,
    run_attacks,
)
from redflag.lab.attacks.sampling import Plain, RepeatedSampling
from redflag.lab.attacks.suppress import LogitBias
from redflag.lab.nano.judge import NanoOracle
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds

ROWS = [make_row(f"r{i}") for i in range(7)]
THRESHOLDS = Thresholds.manual(0.5, ["harm"], run_id="run-1")


def speak(text, seed):
    return f"Here is my answer {seed}. {HARM}"


def target(**more):
    return make_target(speak, alarm_at("Poison"), thresholds=THRESHOLDS, policy=Policy(), **more)


@dataclass
class Failing:
    """An attack that is killed behind so many attempts, in whatever unit that is."""

    inner: RepeatedSampling
    left: int
    name: str = "sampling"
    adaptive: bool = False

    def run(self, target, rows, seed):
        for attempt in self.inner.run(target, rows, seed):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield attempt


def sampled():
    return RepeatedSampling(n=2, temperatures=(1.0,), max_new_tokens=40)


@pytest.mark.parametrize("kills", [(0,), (1,), (3, 0, 4), (5, 5), (13,)])
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(tmp_path, kills, monkeypatch):
    monkeypatch.setattr("redflag.lab.attacks.run_attacks._head", lambda *a: {"format": 1})
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected, _ = record(target(), sampled(), ROWS, whole, 1, unit=2)
    for left in kills:
        with pytest.raises(KeyboardInterrupt):
            record(target(), Failing(sampled(), left), ROWS, cut, 1, unit=2)
    attempts, seconds = record(target(), sampled(), ROWS, cut, 1, unit=2)
    assert cut.read_bytes() == whole.read_bytes()
    assert attempts == expected == record(target(), sampled(), ROWS, cut, 1, unit=2)[0]
    assert len(attempts) == 14 and seconds > 0


def test_a_file_cut_at_any_byte_is_mended(tmp_path):
    path = tmp_path / "sampling.jsonl"
    record(target(), sampled(), ROWS[:3], path, 1, unit=1)
    whole = path.read_bytes()
    for end in range(0, len(whole), 311):
        path.write_bytes(whole[:end])
        record(target(), sampled(), ROWS[:3], path, 1, unit=1)
        assert path.read_bytes() == whole


def test_what_is_there_is_not_made_again(tmp_path):
    first, second = target(), target()
    rows = named_rows(ROWS)
    run_attacks(first, [sampled()], rows, NanoOracle(), tmp_path, 0, unit=3)
    (result,) = run_attacks(second, [sampled()], rows, NanoOracle(), tmp_path, 0, unit=3)
    assert second.backend.sent == [] and len(result.judged) == 14
    assert result.seconds > 0


def test_results_are_those_of_judging_in_memory(tmp_path):
    attacks = [Plain(max_new_tokens=40), Prefill(lengths=(3, 5), max_new_tokens=40)]
    results = run_attacks(target(), attacks, ROWS, NanoOracle(), tmp_path, 5)
    for attack, result in zip(attacks, results, strict=True):
        attempts = [item.attempt for item in result.judged]
        assert attempts == record(target(), attack, ROWS, tmp_path / f"{attack.name}.jsonl", 5)[0]
        judged = judge_attempts(attack, attempts, ROWS, NanoOracle(), target())
        fresh = entries(attack, judged, ROWS, seconds=result.seconds)
        assert result.entries == fresh
    lines = results[0].entries
    assert [line["harm_produced"]["rate"] for line in lines] == [1.0] * 3
    assert [line["harm_released"]["rate"] for line in lines] == [0.0] * 3
    assert (tmp_path / "verdicts.jsonl").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"attack": RepeatedSampling(n=3, temperatures=(1.0,), max_new_tokens=40)},
        {"seed": 2},
        {"rows": ROWS[:6]},
    ],
)
def test_attempts_made_otherwise_are_kept_aside_and_made_anew(tmp_path, other):
    run_attacks(target(), [sampled()], ROWS, NanoOracle(), tmp_path / "both", 1)
    before = (tmp_path / "both" / "sampling.jsonl").read_bytes()
    arguments = ([other.get("attack", sampled())], other.get("rows", ROWS), NanoOracle())
    for folder in ("both", "fresh"):
        run_attacks(target(), *arguments, tmp_path / folder, other.get("seed", 1))
    assert (tmp_path / "both" / "sampling.old.jsonl").read_bytes() == before
    after, fresh = ((tmp_path / folder / "sampling.jsonl").read_bytes() for folder in ("both", "fresh"))
    assert after == fresh != before


@pytest.mark.parametrize("name", ["thresholds", "policy"])
def test_another_guard_judges_the_same_attempts(tmp_path, name, monkeypatch):
    (first,) = run_attacks(target(), [sampled()], ROWS, NanoOracle(), tmp_path, 1)
    aim = target()
    other = {"thresholds": Thresholds.manual(0.999, ["harm"], run_id="run-1"), "policy": Policy(default="continue")}
    setattr(aim, name, other[name])
    monkeypatch.setattr(aim, "answers", lambda *arguments, **options: pytest.fail("it was asked again"))
    (second,) = run_attacks(aim, [sampled()], ROWS, NanoOracle(), tmp_path, 1)
    assert [item.attempt for item in second.judged] == [item.attempt for item in first.judged]
    assert second.entries[-1]["harm_released"]["rate"] > first.entries[-1]["harm_released"]["rate"]


def test_units_have_seeds_of_their_own_and_every_row_its_attempts(tmp_path):
    (result,) = run_attacks(target(), [sampled()], ROWS, NanoOracle(), tmp_path, 1, unit=2)
    assert [item.attempt.request for item in result.judged] == [row.id for row in ROWS for _ in range(2)]
    assert len({item.attempt.text for item in result.judged}) == 14
    marks = [json.loads(line) for line in (tmp_path / "sampling.jsonl").read_text().splitlines()]
    assert [mark for mark in marks if "unit" in mark] == [
        {"unit": 0, "rows": 2},
        {"unit": 1, "rows": 2},
        {"unit": 2, "rows": 2},
        {"unit": 3, "rows": 1},
    ]


def test_an_attack_says_how_many_rows_it_takes(tmp_path):
    seen = []

    @dataclass
    class Learner(Plain):
        name: str = "learner"
        unit: int | None = None

        def run(self, target, rows, seed):
            seen.append(len(rows))
            return super().run(target, rows, seed)

    run_attacks(target(), [Learner(), Learner(name="small", unit=3)], ROWS, NanoOracle(), tmp_path, unit=5)
    assert seen == [7, 3, 3, 1]


def test_an_attack_that_cannot_be_made_is_named_and_the_others_go_on(tmp_path):
    said = []
    results = run_attacks(target(), [LogitBias(), Plain()], ROWS, NanoOracle(), tmp_path, log=said.append)
    assert [line["setting"] for line in results[0].entries] == ["did not run"]
    assert "weights" in results[0].entries[0]["note"] and results[0].entries[0]["not_run"] == len(ROWS)
    assert results[1].entries[0]["requests"] == len(ROWS)
    assert any("did not run" in line for line in said)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "there must be harmful rows"),
        ([make_row("a"), make_row("a")], "its own id"),
        ([make_row("a").__class__(make_row("a").messages, id="b")], "harmless"),
    ],
)
def test_rows_that_cannot_be_attacked_with_are_refused(tmp_path, rows, match):
    with pytest.raises(RedflagError, match=match):
        run_attacks(target(), [Plain()], rows, NanoOracle(), tmp_path)


def test_rows_without_a_name_get_one_and_attacks_of_one_name_are_refused(tmp_path):
    nameless = [make_row("a").__class__(row.messages, "harm", row.onset) for row in ROWS[:2]]
    (result,) = run_attacks(target(), [Plain()], nameless, NanoOracle(), tmp_path)
    assert {item.attempt.request for item in result.judged} == {"row-0", "row-1"}
    with pytest.raises(RedflagError, match="same file"):
        run_attacks(target(), [Plain(), Plain()], ROWS, NanoOracle(), tmp_path)


def test_attacks_are_made_by_name_with_options():
    made = make_attacks(["all"], NANO_OPTIONS)
    assert [attack.name for attack in made] == list(ATTACKS)
    (sampling,) = make_attacks(["sampling"], {"sampling": {"n": 3}})
    assert sampling == RepeatedSampling(n=3)
    (outside,) = make_attacks(["PAIR"], {"PAIR": {"attacker_url": "http://127.0.0.1:1/v1", "attacker_model": "m"}})
    assert outside.name == "PAIR" and set(OUTSIDE) == {"PAIR"}


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [(["pudding"], None, "pudding"), (["none"], {"pudding": {}}, "pudding"), (["none"], {"none": {"n": 3}}, "options")],
)
def test_unknown_attacks_and_options_are_refused(names, options, match):
    with pytest.raises(RedflagError, match=match):
        make_attacks(names, options)


def test_no_key_reaches_the_disk(tmp_path):
    options = {"attacker_url": "http://127.0.0.1:1/v1", "attacker_model": "m", "api_key": "s3cret", "timeout": 0.5}
    (attack,) = make_attacks(["PAIR"], {"PAIR": options})
    (result,) = run_attacks(target(), [attack], ROWS[:1], NanoOracle(), tmp_path)
    assert result.entries[0]["setting"] == "did not run"
    assert "s3cret" not in (tmp_path / "pair.jsonl").read_text()
