"""One set of options names a judge, whatever the verb."""

from __future__ import annotations

from typing import get_args

import pytest

from redflag.errors import RedflagError
from redflag.guard.options import PolicyOptions
from redflag.judges import model
from redflag.judges.endpoint import EndpointJudge
from redflag.judges.options import JudgeOptions
from redflag.judges.rubrics import RUBRICS, Rubric, StrongRejectJudge
from redflag.lab.evaluating.arguments import EvaluateArguments
from redflag.lab.synthesis.synthesize import SynthesizeArguments

NAMED = {"judge": "endpoint", "judge_url": "http://h/v1", "judge_name": "m"}
VERBS = {
    "guard": PolicyOptions,
    "evaluate": lambda **more: EvaluateArguments(model="m", test="t", calibration="c", **more),
    "synthesize": lambda **more: SynthesizeArguments(output_dir="o", **more),
}


def opened(verb, **options):
    made = VERBS[verb](**options)
    return made.second_judge() if verb == "guard" else made.open_judge()


def test_every_rubric_has_a_name():
    assert set(get_args(Rubric)) == set(RUBRICS)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("rubric", RUBRICS)
def test_every_verb_asks_by_every_rubric(verb, rubric):
    judge = opened(verb, **NAMED, judge_rubric=rubric)
    assert judge.identity == RUBRICS[rubric]("http://h/v1", "m").identity
    assert isinstance(judge, StrongRejectJudge if rubric == "strongreject" else EndpointJudge)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_weights_and_their_format(verb, monkeypatch):
    made = []
    monkeypatch.setattr(model, "ModelJudge", lambda *a, **k: made.append((a, k)))
    opened(verb, judge="model", judge_name="guards/lg3", judge_kind="llama-guard")
    assert made == [(("guards/lg3",), {"kind": "llama-guard", "device": "auto"})]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"judge": "endpoint"}, "judge_name and judge_url must be given with the judge endpoint"),
        ({"judge": "endpoint", "judge_name": "m"}, "judge_name and judge_url must be given"),
        ({"judge": "model"}, "judge_name must be given with the judge model"),
    ],
)
def test_what_is_missing_is_named(options, missing):
    with pytest.raises(RedflagError, match=missing):
        JudgeOptions(**options).open_judge()


@pytest.mark.parametrize("change", [{"judge_words": "a,b"}, {"judge_chat": True}, {"judge_template": "file"}])
def test_changes_to_the_short_rubric_are_refused_with_another_one(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("Bad? {answer}")
    assert opened("guard", **NAMED, **change)
    with pytest.raises(RedflagError, match=r"judge_rubric must be short .* \(got guard\)"):
        opened("guard", **NAMED, **change, judge_rubric="guard")
