"""A model in this process: each answer depends on its own question, whoever is asked beside it."""

from __future__ import annotations

import shutil

import pytest

from redflag.errors import RedflagError
from redflag.lab.nano.judge import LabJudgeOptions
from redflag.lab.synthesis import synthesize as verb
from redflag.lab.synthesis.local import load_local
from redflag.lab.synthesis.options import WriterOptions
from redflag.lab.synthesis.questions import Question, Reply


def asked(model, questions):
    got = {}
    model.ask(questions, got.__setitem__)
    assert sorted(got) == list(range(len(questions)))
    return [got[i] for i in range(len(questions))]


def question(text, seed=0, **more):
    return Question(({"role": "user", "content": text},), max_tokens=12, seed=seed, **more)


@pytest.mark.parametrize("folder", ["base", "model"])  # without flags and with
def test_S3_1_answers_of_a_local_model_do_not_depend_on_their_neighbours(origin, folder):
    model = load_local(origin / folder, device="cpu", batch_size=3)
    wanted = [question(f"tell {word}", seed) for seed, word in enumerate(["the", "cat", "sat", "on", "a"])]
    wanted += [question("tell mat", 40, temperature=0.0), question("tell mat", 41, temperature=0.0)]
    together = asked(model, wanted)
    assert together == [asked(model, [one])[0] for one in wanted]
    assert together[5].text == together[6].text and len({reply.text for reply in together}) > 4
    assert all(0 < reply.tokens_out <= 12 and reply.tokens_in > 0 for reply in together)
    assert all("flag" not in reply.text for reply in together)


def test_S3_1_a_question_that_is_too_long_is_refused_and_its_neighbours_are_not(origin):
    model = load_local(origin / "base", device="cpu")
    short, long = question("tell the cat", 1), question("the cat sat on a mat " * 60, 2)
    got = asked(model, [short, long, question("tell fish", 3)])
    assert got[1] == Reply("", "refused", got[1].tokens_in) and got[1].tokens_in > 128
    assert [reply.finish in ("stop", "length") for reply in got] == [True, False, True]
    assert got[0] == asked(model, [short])[0]


@pytest.mark.parametrize("changed", ["model.safetensors", "tokenizer.json"])
def test_S3_1_answers_of_other_files_under_the_same_name_are_not_taken(origin, tmp_path, changed):
    shutil.copytree(origin / "base", tmp_path / "base")
    (tmp_path / "base" / changed).touch()
    one, again, other = (load_local(parent / "base", device="cpu").identity for parent in (origin, origin, tmp_path))
    assert one == again != other


def test_S3_1_whom_to_ask_is_checked(tmp_path, monkeypatch):
    with pytest.raises(RedflagError, match="a writer must be named"):
        WriterOptions().open_writer()
    with pytest.raises(RedflagError, match="does not load"):
        WriterOptions(model=str(tmp_path)).open_writer()
    monkeypatch.setenv("SOME_KEY", "k")
    assert WriterOptions(model="m", url="http://h/v1", key_env="SOME_KEY").open_writer().identity == "m"
    assert LabJudgeOptions().open_judge() is None
    assert LabJudgeOptions(judge="oracle").open_judge().identity.startswith("nano-oracle")
    named = {"judge": "endpoint", "judge_url": "http://h/v1", "judge_name": "g"}
    guard = LabJudgeOptions(**named, judge_rubric="guard").open_judge()
    assert guard.read({"choices": [{"message": {"content": "unsafe\nS1"}}]}).harm == 1.0
    asked = verb._judge(verb.SynthesizeArguments(output_dir="o", **named, judge_guard=True), tmp_path)
    assert asked.identity == guard.identity
    with pytest.raises(RedflagError, match="judge_name must be given"):
        LabJudgeOptions(judge="model").open_judge()
