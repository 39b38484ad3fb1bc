"""The benches in front of a vLLM: where an answer is begun, and that nothing is measured twice."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from redflag.flags import Flag, FlagSpec
from redflag.watching.thresholds import Thresholds

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import dtype
    import smollm2_upstream

    return {"dtype": dtype, "smollm2_upstream": smollm2_upstream}


def test_the_model_goes_on_from_half_of_an_answer_at_most(bench):
    begun = bench["dtype"].begun
    messages = [{"role": "user", "content": "cats?"}, {"role": "assistant", "content": "the cat sat on"}]
    assert begun(messages, 0) == messages[:1]
    assert begun(messages, 4)[-1]["content"] == "the " and begun(messages, 100)[-1]["content"] == "the cat"
    assert begun([messages[0], {"role": "assistant", "content": " a"}], 9) == messages[:1]


def test_a_stage_whose_result_is_there_is_not_measured_again(bench, tmp_path, monkeypatch, capsys):
    module, asked = bench["smollm2_upstream"], []
    shipped = tmp_path / "shipped"
    spec = FlagSpec((Flag("harm", "<|redflag_harm|>", id=7),), run_id="one")
    spec.save(shipped)

    def merge(source, output):
        asked.append("model")
        spec.save(output)

    monkeypatch.setattr(module, "merge_flag", merge)
    monkeypatch.setattr(module, "model_folder", lambda name: shipped)
    monkeypatch.setitem(module.STAGES, "speed", lambda arguments, model: {"rounds": arguments.rounds})
    monkeypatch.setattr(sys, "argv", ["bench", "speed", "--output", str(tmp_path), "--rounds", "5"])
    module.main()
    assert json.loads(capsys.readouterr().out) == {"rounds": 5} and asked == ["model"]
    monkeypatch.setitem(module.STAGES, "speed", lambda *_: pytest.fail("measured twice"))
    module.main()
    assert json.loads(capsys.readouterr().out) == {"rounds": 5}
    replace(spec, run_id="another").save(shipped)
    with pytest.raises(SystemExit, match="must hold the flag that ships"):
        module.main()


def test_two_scored_files_are_compared_row_by_row(bench, tmp_path, monkeypatch, capsys):
    Thresholds.manual(0.5, ["harm"]).save(tmp_path)
    for name, moved in (("bfloat16", 0.1), ("float32", 0.0)):
        rows = [
            {"id": "b", "flag_probs": [[0.2 + moved], [0.3]], "tail_probs": [[0.1]], "token_ids": [1, 2]},
            {"id": "a", "flag_probs": [[0.45 + moved]], "tail_probs": [], "token_ids": [3]},
        ]
        rows += [{**rows[0], "id": "alone"}] if name == "float32" else []
        lines = [json.dumps(row | {"peak": [0.5], "category": None, "onset": None}) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("bfloat16", "float32")]
    monkeypatch.setattr(sys, "argv", ["dtype", "--model", str(tmp_path), "--scored", *paths])
    bench["dtype"].main()
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert (line["compared"], line["responses"], line["steps"]) == ("bfloat16 / float32", 2, 4)
    assert line["largest"] == pytest.approx(0.1) and (line["alarms"], line["alarms_changed"]) == (0, 1)
