"""Options of a policy: each reaches what it is about, and what cannot be meant is named."""

from __future__ import annotations

import dataclasses

import pytest

from redflag import cli
from redflag.errors import RedflagError
from redflag.guard.options import GuardOptions, PolicyOptions
from redflag.judges import model
from redflag.judges.endpoint import EndpointJudge
from redflag.terminal import generate
from redflag.watching.first_token import FirstTokenRule
from redflag.watching.policy import Policy, Reflect


def test_the_defaults_are_the_policys():
    assert PolicyOptions().policy() == Policy()
    assert PolicyOptions().second_judge() is None


def test_every_option_arrives(tmp_path):
    examples = tmp_path / "examples.txt"
    examples.write_text("Once upon a time")
    options = PolicyOptions(
        action="reflect",
        actions="weapons=halt, fraud = escalate,",
        hold_back=3,
        release="sentence",
        observe=True,
        confirmed="replace",
        replacement="Sorry.",
        decoy=True,
        max_interventions=1,
        max_wait_tokens=9,
        rearm=0.25,
        mute_limit=7,
        reflect_cue=" hm",
        reflect_verdict="flag",
        reflect_verdict_cue=" so",
        reflect_words=" bad, good",
        reflect_limit=0.75,
        reflect_max_tokens=5,
        reflect_system=str(examples),
        reflect_stay=True,
        judge_timeout=2.5,
        first_token="threshold",
        first_selected="fraud, theft",
        first_respond="fine",
        first_temperature=1.5,
        first_bias="fraud=-2",
        first_thresholds="fraud=0.2,theft=0.9",
    )
    assert options.policy() == Policy(
        actions={"weapons": "halt", "fraud": "escalate"},
        default="reflect",
        hold_back=3,
        release="sentence",
        observe=True,
        confirmed="replace",
        replacement="Sorry.",
        decoy=True,
        max_interventions=1,
        max_wait_tokens=9,
        rearm=0.25,
        mute_limit=7,
        judge_timeout=2.5,
        first_token=FirstTokenRule(
            selected=("fraud", "theft"),
            respond="fine",
            temperature=1.5,
            bias={"fraud": -2.0},
            thresholds={"fraud": 0.2, "theft": 0.9},
        ),
        reflect=Reflect(
            cue=" hm",
            verdict="flag",
            verdict_cue=" so",
            words=(" bad", " good"),
            limit=0.75,
            max_tokens=5,
            system="Once upon a time",
            stay=True,
        ),
    )


def test_all_of_a_policy_can_be_set():
    """A new setting needs an option, or a reason here why it has none."""
    code_only = {"stop"}  # texts that end a reflection: a list
    fields = {field.name for options in (PolicyOptions, GuardOptions) for field in dataclasses.fields(options)}
    renamed = {"default": "action", "prompt": "judge_prompt"}
    for field in dataclasses.fields(Policy):
        assert renamed.get(field.name, field.name) in fields or field.name == "reflect"
    for field in dataclasses.fields(Reflect):
        assert f"reflect_{field.name}" in fields or field.name in code_only


def test_a_judge_behind_an_address(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    template = tmp_path / "template.txt"
    template.write_text("Bad? {answer}")
    judge = PolicyOptions(
        judge_url="http://h:1/v1",
        judge_name="guard",
        judge_template=str(template),
        judge_words="unsafe,safe",
        judge_key_env="JUDGE_KEY",
        judge_timeout=3.0,
    ).second_judge()
    assert isinstance(judge, EndpointJudge) and judge.model == "guard"
    assert judge.prompt([], "x")[0]["content"].startswith("Bad? <answer ")
    assert judge.read({"choices": [{"message": {"content": "unsafe"}}]}).harm == 1.0


def test_a_judge_in_this_process(monkeypatch):
    made = []
    monkeypatch.setattr(model, "ModelJudge", lambda *a, **k: made.append((a, k)))
    PolicyOptions(judge_folder="guards/lg3", judge_kind="llama-guard", judge_device="cuda:1").second_judge()
    assert made == [(("guards/lg3",), {"kind": "llama-guard", "device": "cuda:1"})]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"actions": "weapons"}, "'weapons'"),
        ({"actions": "=halt"}, "=halt"),
        ({"actions": "weapons="}, "weapons="),
        ({"actions": "a=halt,a=continue"}, "a=continue"),
        ({"actions": "a=shout"}, "shout"),
        ({"action": "shout"}, "shout"),
        ({"action": "replace"}, "replacement"),
        ({"release": "never"}, "never"),
        ({"hold_back": -1}, "hold_back"),
        ({"reflect_words": "bad"}, "reflect_words"),
        ({"reflect_words": "bad,good,ugly"}, "reflect_words"),
        ({"reflect_words": "bad, bad"}, "reflect_words"),
        ({"reflect_words": ",good"}, "reflect_words"),
        ({"reflect_system": "/no/such/file"}, "/no/such/file"),
        ({"judge_timeout": 0.0}, "judge_timeout"),
        ({"first_selected": "fraud"}, "first_token is off"),
        ({"first_token": "threshold", "first_bias": "fraud=much"}, "first_bias"),
        ({"first_token": "threshold", "first_thresholds": "fraud"}, "first_thresholds"),
        ({"first_token": "threshold", "first_temperature": 0.0}, "temperature"),
        ({"action": "force", "confirmed": "replace"}, "replacement"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_named(options, named):
    with pytest.raises(RedflagError, match=named):
        PolicyOptions(**options).policy()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"action": "escalate"}, "judge_url"),
        ({"actions": "fraud=escalate"}, "judge_folder"),
        ({"judge_url": "http://h"}, "judge_name"),
        ({"judge_url": "http://h", "judge_name": "m", "judge_folder": "f"}, "leave one"),
        ({"judge_url": "h", "judge_name": "m"}, "address"),
        ({"judge_url": "http://h", "judge_name": "m", "judge_words": "yes"}, "judge_words"),
        ({"judge_url": "http://h", "judge_name": "m", "judge_template": "/no/file"}, "/no/file"),
        ({"judge_url": "http://h", "judge_name": "m", "judge_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"judge_folder": "/no/guard"}, "/no/guard"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_named(options, named, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(RedflagError, match=named):
        PolicyOptions(**options).second_judge()


def test_who_only_observes_needs_no_judge():
    assert PolicyOptions(action="escalate", observe=True).second_judge() is None


def test_options_come_from_a_flat_file_and_from_words(tmp_path):
    config = tmp_path / "policy.yaml"
    config.write_text("action: reflect\nhold_back: 4\nreflect_words: ' bad, good'\nreplacement: Sorry.\n")
    words = ["Hi", "--model", "m", "--config", str(config), "--hold_back", "6", "--actions", "a=halt"]
    _, options = cli.parse(generate, words, "redflag generate")
    assert (options.action, options.hold_back, options.actions) == ("reflect", 6, "a=halt")
    assert options.policy().reflect.words == (" bad", " good")
    config.write_text("hold_bac: 4\n")
    with pytest.raises(RedflagError, match="did you mean hold_back"):
        cli.parse(generate, words, "redflag generate")
