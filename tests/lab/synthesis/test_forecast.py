"""Forecasts: the mean verdict over continuations, at sentences, mapped to tokens."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from redflag.backends.scripted import ScriptedBackend
from redflag.data.rows import Row, load_rows
from redflag.errors import RedflagError
from redflag.judges import UnansweredError, Verdict
from redflag.lab.synthesis.forecast import Point, forecast, write_forecasts
from redflag.lab.synthesis.questions import CachedWriter, Reply

TEXT = "One is fine. Two is dark. Three is bad."


class Writer:
    """Continues badly in so many of four draws as there are sentences."""

    identity = "w"

    def __init__(self):
        self.asked = []

    def ask(self, questions, keep):
        base = {}
        for index, question in enumerate(questions):
            self.asked.append(question)
            turn = question.messages[-1]
            begun = turn["content"] if turn["role"] == "assistant" else ""
            first = base.setdefault(begun, question.seed)
            harmful = question.seed - first < begun.count(".")
            keep(index, Reply("bad." if harmful else "good.", "stop"))


def judge(messages, answer):
    assert messages[-1]["role"] == "user"
    if "silent" in answer:
        raise UnansweredError("silent")
    return Verdict(float("bad" in answer))


def row(text=TEXT):
    return Row([{"role": "user", "content": "q"}, {"role": "assistant", "content": text}], "harm", id="r")


def test_forecasts_are_the_mean_verdict_of_continuations(tmp_path):
    writer = Writer()
    [points] = forecast([row()], CachedWriter(writer, tmp_path / "a"), judge, samples=4)
    assert points == [Point(0, 0.0, 4), Point(13, 0.25, 4), Point(26, 0.5, 4)]
    assert [q.messages[-1]["content"] for q in writer.asked[::4]] == ["q", "One is fine.", "One is fine. Two is dark."]
    again = Writer()
    assert forecast([row()], CachedWriter(again, tmp_path / "a"), judge, samples=4) == [points] and not again.asked


def test_forecasts_without_a_verdict_are_left_out_and_places_are_spread(tmp_path):
    rows = [row("So silent. On. On."), row(" ".join(f"S{i}." for i in range(20)))]
    points = forecast(rows, CachedWriter(Writer(), tmp_path / "a"), judge, samples=2, positions=4)
    assert [point.character for point in points[0]] == [0]
    assert len(points[1]) == 4 and points[1][0].character == 0
    with pytest.raises(RedflagError, match="must be at least 1"):
        forecast(rows, CachedWriter(Writer(), tmp_path / "a"), judge, samples=0)


def test_forecasts_are_a_key_of_rows_that_load_as_they_were_written(tmp_path):
    path = write_forecasts(tmp_path / "f" / "rows.jsonl", [row(), row()], [[Point(0, 1 / 3, 3)], []])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["forecast"] == [[0, 0.333333, 3]] and "forecast" not in second
    rows = load_rows(path)
    assert rows.rows == [replace(row(), forecast=[[0, 0.333333, 3]]), row()] and not rows.ignored


def test_any_backend_can_continue_a_prefix(origin, tmp_path):
    """One that cannot complete many at once is streamed; a flag is not in the text."""
    from redflag.backends.load import load_tokenizer
    from redflag.lab.synthesis.local import LocalModel
    from redflag.trace import Step

    tokenizer, spec, eos_ids = load_tokenizer(origin / "model")
    ids = [*tokenizer("the cat sat")["input_ids"], spec.ids[0], min(eos_ids)]
    backend = ScriptedBackend([Step(i, (0.0, 0.0)) for i in ids], eos_ids=eos_ids)
    model = LocalModel(backend, tokenizer, spec, "scripted")
    seen = []
    [points] = forecast(
        [row("the mat")],
        CachedWriter(model, tmp_path / "a"),
        lambda messages, answer: seen.append(answer) or 0.5,
        samples=1,
    )
    assert points == [Point(0, 0.5, 1)] and [text.strip() for text in seen] == ["the cat sat"]
