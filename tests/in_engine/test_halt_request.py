"""What a request may ask of the in-engine halt, and what is refused at admission."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.in_engine import halt_v1, halt_v2
from redflag.in_engine.halt_request import MAX_FLAGS, HaltSettings, admit, halted_by, request_fields
from redflag.watching.monitor import MonitorConfig
from redflag.watching.policy import Policy
from redflag.watching.thresholds import Thresholds


def spec(*categories: str) -> FlagSpec:
    flags = FlagSpec.of(*categories).flags
    return FlagSpec(tuple(dataclasses.replace(flag, id=5 + i) for i, flag in enumerate(flags)))


HARM = spec("harm", "fraud")


def params(args: dict[str, Any] | None = None, **more: Any) -> SimpleNamespace:
    """vLLM's `SamplingParams` as they are when nothing else is asked for."""
    given_ = args if args is not None else {"redflag_flag_ids": [5], "redflag_thresholds": [0.5]}
    usual = {
        "extra_args": given_,
        "stop_token_ids": [5],
        "include_stop_str_in_output": False,
        "logit_bias": None,
        "allowed_token_ids": None,
        "bad_words": [],
        "structured_outputs": None,
        "trace_decode_token_ids": None,
        "min_tokens": 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
    }
    return SimpleNamespace(**{**usual, **more})


def test_a_request_without_settings_is_left_alone_whatever_it_asks():
    anything = {"logit_bias": {5: -100.0}, "min_tokens": 9, "stop_token_ids": []}
    assert admit(params({}, **anything), penalties_first=True) is None
    assert admit(params({"kv_transfer_params": {}}, **anything), penalties_first=True) is None
    assert HaltSettings.parse(None) is None


def test_fields_hold_what_the_thresholds_say():
    monitor = MonitorConfig("run", window=3, warm_up=2)
    thresholds = dataclasses.replace(
        Thresholds.manual(0.5, HARM.categories, monitor), values={"fraud": 0.25, "harm": 0.75}
    )
    policy = Policy(actions={"fraud": "continue"})
    fields = request_fields(HARM, thresholds, policy)
    assert json.loads(json.dumps(fields)) == {
        "stop_token_ids": [5, 6],
        "vllm_xargs": {
            "redflag_flag_ids": [5, 6],
            "redflag_thresholds": [0.75, 0.25],
            "redflag_action": ["halt", "continue"],
            "redflag_run": 3,
            "redflag_warm_up": 2,
        },
    }
    assert request_fields(HARM, thresholds, Policy(observe=True))["vllm_xargs"]["redflag_action"] == ["continue"] * 2


monitors = st.one_of(
    st.builds(MonitorConfig, warm_up=st.integers(0, 9)),
    st.builds(MonitorConfig, st.just("run"), window=st.integers(2, 99), warm_up=st.integers(0, 9)),
    st.builds(
        MonitorConfig,
        st.just("ema"),
        decay=st.floats(0, 1, exclude_min=True),
        prior=st.floats(0, 1, exclude_min=True, exclude_max=True),
    ),
)


@given(monitors, st.floats(0, 1, exclude_min=True))
def test_what_is_sent_is_what_is_read(monitor, threshold):
    fields = json.loads(json.dumps(request_fields(HARM, Thresholds.manual(threshold, HARM.categories, monitor))))
    settings = admit(params(fields["vllm_xargs"], stop_token_ids=fields["stop_token_ids"]), penalties_first=True)
    assert settings is not None and settings.monitor == monitor
    assert settings.flag_ids == (5, 6) and settings.thresholds == (threshold, threshold) and all(settings.halts)


def test_the_category_that_halted_is_read_from_the_stop_reason():
    assert [halted_by(reason, HARM) for reason in (5, 6, 1, "</s>", None)] == ["harm", "fraud", None, None, None]


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        (Thresholds.manual(0.5, HARM.categories, MonitorConfig("cusum")), "cusum"),
        (Thresholds.manual(0.5, HARM.categories, MonitorConfig("first")), "first"),
        (Thresholds.manual(0.5, ["harm"]), "thresholds must name exactly the flags"),
        (Thresholds.manual(0.5, HARM.categories, logprob_mode="processed"), "raw"),
    ],
)
def test_thresholds_that_the_engine_cannot_keep_are_refused(thresholds, words):
    with pytest.raises(RedflagError, match=words):
        request_fields(HARM, thresholds)


def test_more_flags_than_the_engine_has_room_for_are_refused():
    many = spec(*(f"kind {i}" for i in range(MAX_FLAGS + 1)))
    with pytest.raises(RedflagError, match=f"1 to {MAX_FLAGS}"):
        request_fields(many, Thresholds.manual(0.5, many.categories))


def two(**args: Any) -> dict[str, Any]:
    return {"redflag_flag_ids": [5, 6], "redflag_thresholds": [0.5, 0.5], **args}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"redflag_thresholds": [0.5]}, r"redflag_flag_ids must be .*\(got None"),
        ({"redflag_flag_ids": [5]}, r"redflag_thresholds must be .*\(got None"),
        ({"redflag_flag_ids": 5, "redflag_thresholds": [0.5]}, r"redflag_flag_ids must be .*\(got 5"),
        ({"redflag_flag_ids": [], "redflag_thresholds": []}, "1 to 16"),
        ({"redflag_flag_ids": ["5"], "redflag_thresholds": [0.5]}, "list of numbers"),
        ({"redflag_flag_ids": [5.0], "redflag_thresholds": [0.5]}, "list of numbers"),
        ({"redflag_flag_ids": [True], "redflag_thresholds": [0.5]}, "list of numbers"),
        ({"redflag_flag_ids": [-5], "redflag_thresholds": [0.5]}, "whole numbers of at least 0"),
        ({"redflag_flag_ids": [5, 5], "redflag_thresholds": [0.5, 0.5]}, "different"),
        ({"redflag_flag_ids": [5, 6], "redflag_thresholds": [0.5]}, "one threshold and one action for each"),
        (two(redflag_thresholds=[0.5, 0.0]), r"thresholds must be above 0 .*\(got 0.0"),
        (two(redflag_thresholds=[0.5, 50]), r"thresholds must be above 0 .*\(got 50.0"),
        (two(redflag_thresholds=[0.5, math.nan]), r"thresholds must be above 0 .*\(got nan"),
        (two(redflag_thresholds="0.5"), "list of numbers"),
        (two(redflag_threshold=0.5), "got redflag_threshold"),
        (two(redflag_action="reflect"), r"redflag_action must be .*\(got 'reflect'"),
        (two(redflag_action=["halt"]), "one threshold and one action for each"),
        (two(redflag_action=3), r"redflag_action must be .*\(got 3"),
        (two(redflag_run=0), r"window must be .*\(got 0"),
        (two(redflag_run=1.5), r"window must be .*\(got 1.5"),
        (two(redflag_run="3"), r"window must be .*\(got '3'"),
        (two(redflag_warm_up=-1), r"warm_up must be .*\(got -1"),
        (two(redflag_ema_decay=0), r"decay must be .*\(got 0"),
        (two(redflag_ema_decay="fast"), r"decay must be .*\(got 'fast'"),
        (two(redflag_ema_decay=0.5, redflag_ema_prior=1), r"prior must be .*\(got 1"),
        (two(redflag_ema_prior=0.1), "must come with"),
        (two(redflag_ema_decay=0.5, redflag_run=2), "one monitor"),
    ],
)
def test_nonsense_is_refused_with_the_value(args, words):
    for processor in (halt_v1.HaltProcessor, halt_v2.HaltProcessor):
        with pytest.raises(RedflagError, match=words):
            processor.validate_params(params(args, stop_token_ids=[5, 6]))


@pytest.mark.parametrize(
    "blinding",
    [
        {"logit_bias": {9: 100.0}},
        {"allowed_token_ids": [1, 2]},
        {"bad_words": ["x"]},
        {"structured_outputs": object()},
        {"min_tokens": 3},
        {"trace_decode_token_ids": [1]},
        {"stop_token_ids": []},
        {"stop_token_ids": None},
        {"include_stop_str_in_output": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_would_blind_the_watch_or_let_a_flag_out_is_refused(blinding):
    for processor in (halt_v1.HaltProcessor, halt_v2.HaltProcessor):
        processor.validate_params(params())
        with pytest.raises(RedflagError, match=next(iter(blinding))):
            processor.validate_params(params(**blinding))


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_are_refused_where_they_come_before_the_measurement(penalty):
    halt_v1.HaltProcessor.validate_params(params(**{penalty: 1.5}))
    with pytest.raises(RedflagError, match=penalty):
        halt_v2.HaltProcessor.validate_params(params(**{penalty: 1.5}))


def test_thresholds_of_prompts_are_refused_where_the_engine_halts() -> None:
    thresholds = Thresholds.manual(0.5, HARM.categories)
    with pytest.raises(RedflagError, match=r"policy\.prompt must be None"):
        request_fields(HARM, thresholds, Policy(prompt=thresholds))
