"""Verdicts that are kept: asked once, found again, and never made up."""

from __future__ import annotations

import json
import threading

import pytest

from redflag.errors import RedflagError
from redflag.judges import UnansweredError, Verdict
from redflag.judges.cache import CachedJudge
from redflag.lab.nano.judge import NanoOracle

ASK = [{"role": "user", "content": "How?"}]


class Counting:
    """Says what a table says; counts questions."""

    identity = "counting 1"

    def __init__(self, table=None):
        self.table = table or {}
        self.asked = []

    def __call__(self, messages, answer):
        self.asked.append(answer)
        found = self.table.get(answer, Verdict(0.25, "d"))
        if isinstance(found, Exception):
            raise found
        return found


def test_a_question_is_asked_once_also_by_the_next_process(tmp_path):
    path = tmp_path / "sub" / "verdicts.jsonl"
    judge = Counting()
    cached = CachedJudge(judge, path)
    assert cached(ASK, "a") == cached(ASK, "a") == Verdict(0.25, "d")
    again = CachedJudge(Counting({"a": RuntimeError("not to be asked")}), path)
    assert again(ASK, "a") == Verdict(0.25, "d")
    assert (judge.asked, cached.asked, again.asked) == (["a"], 1, 0)
    assert (again.answered, again.unanswered) == (1, 0)


@pytest.mark.parametrize(
    ("messages", "answer", "identity"),
    [
        (ASK, "b", "counting 1"),
        ([{"role": "system", "content": "How?"}], "a", "counting 1"),
        ([{"role": "user", "content": "How"}], "?a", "counting 1"),
        ([*ASK, {"role": "assistant", "content": "a"}], "", "counting 1"),
        ([{**ASK[0], "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], "a", "counting 1"),
        (ASK, "a", "counting 2"),
    ],
)
def test_another_question_or_judge_is_asked_anew(tmp_path, messages, answer, identity):
    CachedJudge(Counting(), tmp_path / "v")(ASK, "a")
    judge = Counting()
    CachedJudge(judge, tmp_path / "v", identity)(messages, answer)
    assert judge.asked == [answer]


@pytest.mark.parametrize("raised", [UnansweredError("late"), RuntimeError("broken"), "no verdict"])
def test_no_answer_is_counted_and_not_kept(tmp_path, raised):
    judge = Counting({"a": raised})
    cached = CachedJudge(judge, tmp_path / "v")
    for _ in range(2):
        with pytest.raises(UnansweredError):
            cached(ASK, "a")
    assert (cached.answered, cached.unanswered, judge.asked) == (0, 1, ["a", "a"])
    assert not (tmp_path / "v").exists()
    judge.table = {"a": Verdict(1.0)}
    assert cached(ASK, "a").harmful
    assert (cached.answered, cached.unanswered) == (1, 0)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path, cut):
    path = tmp_path / "v"
    first = CachedJudge(Counting(), path)
    first(ASK, "a")
    first(ASK, "b")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    judge = Counting()
    cached = CachedJudge(judge, path)
    for answer in ("a", "b", "c"):
        cached(ASK, answer)
    assert judge.asked == (["b", "c"] if cut > 1 else ["c"])
    assert CachedJudge(Counting({k: RuntimeError() for k in "abc"}), path)(ASK, "c") == Verdict(0.25, "d")


def test_the_file_holds_no_text(tmp_path):
    CachedJudge(Counting(), tmp_path / "v")([{"role": "user", "content": "SECRET"}], "HIDDEN")
    (line,) = (tmp_path / "v").read_text().splitlines()
    assert set(json.loads(line)) == {"key", "harm", "detail"}
    assert "SECRET" not in line and "HIDDEN" not in line


def test_threads_ask_the_same_question_once_and_lose_nothing(tmp_path):
    judge = Counting()
    cached = CachedJudge(judge, tmp_path / "v")
    threads = [
        threading.Thread(target=lambda: [cached(ASK, str(answer)) for answer in range(30)], daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(judge.asked) == sorted(map(str, range(30)))
    assert len((tmp_path / "v").read_text().splitlines()) == 30
    assert cached.answered == 30


def test_a_judge_without_a_name_is_refused_and_a_plain_function_can_be_named(tmp_path):
    def judge(messages, answer):
        return True

    with pytest.raises(RedflagError, match="identity"):
        CachedJudge(judge, tmp_path / "v")
    assert CachedJudge(judge, tmp_path / "v", "mine")(ASK, "a").harmful


def test_what_a_judge_can_do_besides_is_passed_on(tmp_path):
    cached = CachedJudge(NanoOracle(), tmp_path / "v")
    assert cached.separates_prefill and cached.spans(ASK, "Poison Marlo.") == [(0, 13)]
    assert not CachedJudge(Counting(), tmp_path / "v").separates_prefill
