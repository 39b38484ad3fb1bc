"""SGLang's request and response, after its source: a stand-in answers as its sampler would."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.scale.sglang.generate_route import FLAG_BIAS, check_temperature, finish_reason, request, steps
from redflag.backends import Sampling
from redflag.errors import RedflagError
from redflag.trace import Step

FLAGS = [5, 7]


def answer(body: dict[str, Any], logits_TV: torch.Tensor, *, original: bool = False, incremental: bool = False):
    """The chunks of a server with these logits, which takes the most likely token: bias, then temperature, then values.

    As in SGLang: float32; `original` is SGLANG_RETURN_ORIGINAL_LOGPROB; a sampled batch takes the logarithm of
    probabilities, a greedy one log-softmax.
    """
    params = body["sampling_params"]
    logits_TV = logits_TV.clone()
    for token, bias in params["logit_bias"].items():
        logits_TV[:, int(token)] += bias
    logprobs_TV = torch.log_softmax(logits_TV, -1)
    if params["temperature"] and not original:
        probs_TV = torch.softmax(logits_TV / params["temperature"], -1)
        logprobs_TV = probs_TV.log().clamp(min=torch.finfo(torch.float32).min)
    tokens, rows = [], []
    for t, logprobs_V in enumerate(logprobs_TV):
        token = int(logits_TV[t].argmax())
        tokens.append([logprobs_V[token].item(), token, None])
        rows.append([[logprobs_V[i].item(), i, None] for i in body["token_ids_logprob"]])
        first, end = (t if incremental else 0), t == len(logits_TV) - 1
        meta = {
            "id": "r",
            "finish_reason": {"type": "length", "length": t + 1} if end else None,
            "completion_tokens": t + 1,
            "output_token_logprobs": tokens[first:],
            "output_token_ids_logprobs": rows[first:],
        }
        ids = [token for _, token, _ in tokens[first:]]
        yield json.loads(json.dumps({"text": "", "output_ids": ids, "meta_info": meta}))


def read(chunks: Any, flag_ids: list[int], watch: tuple[int, ...] = ()) -> list[Step]:
    got: list[Step] = []
    for chunk in chunks:
        got += steps(chunk, len(got), flag_ids, watch)
    return got


def test_the_request_is_what_generate_expects():
    sampling = Sampling(max_new_tokens=9, temperature=1.0, top_p=0.9, top_k=0, min_p=0.1, seed=3, stop=("x",))
    assert request([1, 2], sampling, FLAGS, watch=[9]) == {
        "input_ids": [1, 2],
        "sampling_params": {
            "max_new_tokens": 9,
            "temperature": 1.0,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.0,
            "logit_bias": {"5": FLAG_BIAS, "7": FLAG_BIAS},
            "stop_token_ids": [5, 7],
            "sampling_seed": 3,
        },
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": [5, 7, 9],
        "return_text_in_logprobs": False,
    }
    assert "sampling_seed" not in request([1], Sampling(), FLAGS)["sampling_params"]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    lift=st.floats(-15, 15),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    incremental=st.booleans(),
)
def test_probabilities_are_those_of_the_raw_logits_though_flags_are_pushed_down(seed, lift, temperature, incremental):
    logits_TV = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed)) * 3
    logits_TV[:, 5] += lift
    wanted = torch.softmax(logits_TV.double(), -1)
    body = request([1], Sampling(temperature=temperature), FLAGS, watch=(2, 3), original_logprobs=True)
    original = temperature not in (0.0, 1.0)
    chunks = list(answer(body, logits_TV, original=original, incremental=incremental))
    got = read(chunks, FLAGS)
    assert len(got) == 4 and finish_reason(chunks[-1]) == "length"
    for step, probs_V in zip(got, wanted, strict=True):
        assert step.flag_probs == pytest.approx(probs_V[FLAGS].tolist(), abs=1e-5)
        assert step.token_id not in FLAGS
    for step, probs_V in zip(read(chunks, FLAGS, (2, 3)), wanted, strict=True):
        assert step.flag_probs == pytest.approx(probs_V[[2, 3]].tolist(), abs=1e-5)


def test_a_temperature_that_the_server_would_put_into_the_values_is_refused():
    with pytest.raises(RedflagError, match="SGLANG_RETURN_ORIGINAL_LOGPROB=1"):
        request([1], Sampling(temperature=0.7), FLAGS)
    request([1], Sampling(temperature=0.7), FLAGS, original_logprobs=True)
    logits_TV = torch.tensor([[0.0, 1.0, 2.0, 0.5, 0.1, 2.0, 1.0, 0.0]])
    cool, hot = (request([1], Sampling(temperature=t), FLAGS, original_logprobs=True) for t in (1.0, 2.0))
    pair = [read(answer(body, logits_TV), FLAGS)[0] for body in (cool, hot)]
    with pytest.raises(RedflagError, match="must not depend on temperature"):
        check_temperature(*pair)
    check_temperature(*(read(answer(body, logits_TV, original=True), FLAGS)[0] for body in (cool, hot)))
    with pytest.raises(RedflagError):
        check_temperature(Step(1, (math.nan,)), Step(1, (math.nan,)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling": Sampling(repetition_penalty=1.1)}, "after penalties"),
        ({"token_ids": []}, "at least one token"),
        ({"flag_ids": []}, "at least one flag"),
        ({"watch": [5]}, "none that is in watch"),
    ],
)
def test_a_request_that_would_not_be_measured_is_refused(change, words):
    with pytest.raises(RedflagError, match=words):
        request(**{"token_ids": [1], "sampling": Sampling(), "flag_ids": FLAGS, **change})


def chunk(token: int = 1, row: Any = ((-50.0, 5, None), (-60.0, 7, None)), **meta: Any) -> dict[str, Any]:
    record = {
        "finish_reason": None,
        "completion_tokens": 1,
        "output_token_logprobs": [[-0.1, token, None]],
        "output_token_ids_logprobs": [row],
    }
    return {"meta_info": {**record, **meta}}


@pytest.mark.parametrize(
    "unmeasured",
    [
        chunk(row=((None, 5, None), (-60.0, 7, None))),
        chunk(row=((-math.inf, 5, None), (-60.0, 7, None))),
        chunk(row=((torch.finfo(torch.float32).min, 5, None), (-60.0, 7, None))),
        chunk(row=((math.nan, 5, None), (-60.0, 7, None))),
        chunk(row=((-60.0, 7, None),)),
        chunk(token=5),
    ],
    ids=["null", "hidden", "underflow", "NaN", "missing", "a flag chosen"],
)
def test_a_step_that_was_not_measured_carries_nan(unmeasured):
    (step,) = steps(unmeasured, 0, FLAGS)
    assert all(map(math.isnan, step.flag_probs))


@pytest.mark.parametrize(
    "broken",
    [
        {"error": {"message": "out of memory"}},
        chunk(finish_reason={"type": "abort", "message": "gone"}),
        {"text": "x"},
        chunk(output_token_ids_logprobs=[]),
        chunk(output_token_ids_logprobs=None),
        chunk(completion_tokens=3),
        chunk(completion_tokens=None),
        chunk(output_token_logprobs=[[]]),
    ],
)
def test_a_chunk_that_leaves_tokens_unjudged_is_an_error(broken):
    with pytest.raises(RedflagError, match="judged"):
        steps(broken, 0, FLAGS)


def test_a_chunk_is_read_once():
    assert steps(chunk(), 1, FLAGS) == ()
    with pytest.raises(RedflagError):
        steps(chunk(), 2, FLAGS)
