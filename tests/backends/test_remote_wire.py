from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from upstream import DONE, event

from redflag.backends import Sampling
from redflag.backends.remote_wire import TOP, RefusalError, StreamReader, request_body
from redflag.trace import Step

PROMPT = [7, 8]
WIRE = dict(model="m", measured=[5, 6], banned=[5, 6], eos_ids=[1, 2], upper_bound=False)
# What the flags 5 and 6 have at three tokens, and what arrives of it.
TOPS = [{9: -1.0, 5: -2.0, 6: -3.0}, {10: -0.5, 5: -900.0, 6: 1e-7}, {1: -0.1, 5: -1e-9, 6: -7.0}]
STEPS = [
    Step(9, (math.exp(-2.0), math.exp(-3.0))),
    Step(10, (0.0, 1.0)),
    Step(1, (math.exp(-1e-9), math.exp(-7.0))),
]


def reader(**changes):
    return StreamReader(PROMPT, **{"measured": [5, 6], "banned": [5, 6], "eos_ids": [1], **changes})


def test_every_sampling_option_is_sent_whatever_the_served_model_would_choose():
    body = request_body(PROMPT, Sampling(), 3, **WIRE)
    assert body == {
        "model": "m",
        "prompt": [7, 8],
        "stream": True,
        "n": 1,
        "max_tokens": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [1, 2],
        "logprobs": 2,
        "logprob_token_ids": [5, 6],
        "logit_bias": {"5": -100.0, "6": -100.0},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    json.dumps(body)


@pytest.mark.parametrize(
    ("sampling", "sent"),
    [
        (Sampling(temperature=0.0), {"temperature": 0.0}),
        (Sampling(top_p=0.5, top_k=7, min_p=0.1), {"top_p": 0.5, "top_k": 7, "min_p": 0.1}),
        (Sampling(repetition_penalty=1.3, seed=4), {"repetition_penalty": 1.3, "seed": 4}),
        (Sampling(seed=-1), {"seed": 2**63 - 1}),  # -1 would be no seed
        (Sampling(seed=-(2**61)), {"seed": 2**63 - 2**61}),
    ],
)
def test_options_are_sent_as_the_server_names_them(sampling, sent):
    body = request_body(PROMPT, sampling, 3, **WIRE)
    assert {key: body[key] for key in sent} == sent


def test_stop_texts_are_not_the_servers_business():
    assert "stop" not in request_body(PROMPT, Sampling(stop=("end",)), 3, **WIRE)


def test_watched_ids_are_asked_for_once_and_flags_stay_banned():
    body = request_body(PROMPT, Sampling(), 3, **{**WIRE, "measured": [9, 7, 9]})
    assert (body["logprob_token_ids"], body["logprobs"]) == ([9, 7], 2)
    assert set(body["logit_bias"]) == {"5", "6"}
    watching = reader(measured=[9, 7, 9])
    assert watching.feed(event([9], [{9: -1.0, 7: -2.0}])) == [Step(9, (math.exp(-1), math.exp(-2), math.exp(-1)))]


def test_an_upper_bound_asks_for_the_most_likely_tokens():
    body = request_body(PROMPT, Sampling(), 3, **{**WIRE, "upper_bound": True})
    assert body["logprobs"] == TOP and "logprob_token_ids" not in body


ANSWERS = [
    event([9], TOPS[:1], prompt_token_ids=PROMPT) + event([10], TOPS[1:2]) + event([1], TOPS[2:], "stop") + DONE,
    event([9, 10, 1], TOPS, "stop") + DONE,
    event([9], TOPS[:1], text="") + b": still here\n\n" + event([10, 1], TOPS[1:]) + event([], [], "stop", text=""),
    event([9], TOPS[:1]).replace(b"\n\n", b"\r\n\r\n") + event([10], TOPS[1:2]) + event([1], TOPS[2:], "stop"),
    event([9], TOPS[:1], token_ids=...) + event([10], TOPS[1:2], prompt_token_ids=None) + event([1], TOPS[2:], "stop"),
    event([9, 10, 1], TOPS, "stop") + b'data: {"choices": [], "usage": {}}\n\n' + DONE,
]


@pytest.mark.parametrize("number", range(len(ANSWERS)))
@given(data=st.data())
def test_an_answer_gives_the_same_steps_however_it_is_cut(number, data):
    answer = ANSWERS[number]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    one = reader()
    steps = []
    for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        steps += one.feed(answer[start:end])
    assert steps == STEPS and one.finish == "stop"
    one.ended()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (event([9], TOPS[:1], logprobs=None), "without log-probabilities"),
        (event([9], TOPS[:1], logprobs=...), "without log-probabilities"),
        (event([], [], logprobs=None, text="harm"), "without log-probabilities"),
        (event([], [], text="harm"), "text without tokens"),
        (event([9, 10], TOPS[:1], token_ids=[9, 10]), "2 tokens with 1 set"),
        (event([9, 10], TOPS[:2], token_ids=[9]), "1 tokens with 2 set"),
        (event([9], [{9: -1.0, 5: -2.0}]), "no log-probability of token_id:6"),
        (event([9], TOPS[:1], token_ids=[10]), "named token 10 'token_id:9'"),
        (event([9], TOPS[:1], token_ids=["9"]), "its id is not certain"),
        (event([1], TOPS[2:], token_ids=[True]), "its id is not certain"),
        (event([-3], [{**TOPS[0]}]), "its id is not certain"),
        (event([99], TOPS[:1]), "its id is not certain"),
        (event([9], TOPS[:1]).replace(b"token_id:9", b"cat"), "its id is not certain"),
        (event([9], TOPS[:1], token_ids=...).replace(b"token_id:9", b"cat"), "instead of its id"),
        (event([5], [{5: -0.1, 6: -3.0}]), "token 5, which logit_bias bans"),
        (event([9], [{9: -1.0, 5: 0.5, 6: -3.0}]), "0.5, which is not a log-probability"),
        (event([9], [{9: -1.0, 5: math.inf, 6: -3.0}]), "not a log-probability"),
        (event([9], [{9: -1.0, 5: "low", 6: -3.0}]), "unexpected shape"),
        (event([9], TOPS[:1], index=1), "second response"),
        (event([9], TOPS[:1], prompt_token_ids=[7]), "changed the prompt"),
        (event([9], TOPS[:1], "abort"), "finish_reason 'abort'"),
        (event([9], TOPS[:1], "content_filter"), "finish_reason 'content_filter'"),
        (event([9], TOPS[:1], "stop"), "ended the response at token 9"),
        (event([], [], "stop", text=""), "ended the response at token None"),
        (event([1, 9], [TOPS[2], TOPS[0]]), "continued after the end"),
        (event([1], TOPS[2:]) + event([9], TOPS[:1]), "continued after the end"),
        (b"data: [DONE]\n\n", "without a finish_reason"),
        (b"data: [1]\n\n", "unexpected shape"),
        (b"data: 7\n\n", "unexpected shape"),
        (b'data: {"choices": 7}\n\n', "unexpected shape"),
        (b'data: {"choices": [7]}\n\n', "unexpected shape"),
        (b"data: {}\n\n", "unexpected shape"),
        (b"data: {\n\n", "invalid JSON"),
        (b'data: {"a": "\xff"}\n\n', "invalid JSON"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "unexpected shape|invalid JSON"),
        (b'data: {"error": {"message": "out of memory", "code": 500}}\n\n', "failed: out of memory"),
        (b'data: {"error": "gone"}\n\n', "failed: gone"),
    ],
)
def test_what_cannot_be_judged_is_a_fault(bad, named):
    with pytest.raises(ConnectionError, match=named):
        reader(vocab_size=60).feed(bad)


def own(logprobs, chosen=...):
    """One chunk of tokens 667 and 9, with the maps and the chosen tokens' log-probabilities as given."""
    names = ["token_id:667", "token_id:9"]
    maps = [{f"token_id:{token_id}": value for token_id, value in top.items()} for top in logprobs]
    sent = {"tokens": names, "top_logprobs": maps} | ({} if chosen is ... else {"token_logprobs": chosen})
    return event([667, 9], [{}, {}], logprobs=sent)


FIRST, SECOND = {667: -1.0, 5: -3.0, 6: -4.0}, {9: -2.0, 5: -5.0, 6: -6.0}
BOTH = {667: -1.0, 9: -7.0, 5: -3.0, 6: -4.0}


@pytest.mark.parametrize(
    ("chunk", "named"),
    [
        (own([FIRST, FIRST]), "token_id:9 is not among them"),  # copied
        (own([SECOND, FIRST]), "token_id:667 is not among them"),  # shifted
        (own([{5: -3.0, 6: -4.0}, SECOND]), "token_id:667 is not among them"),
        (own([BOTH, BOTH], [-1.0, -2.0]), "token_id:9 has -7.0 there, and -2.0 by itself"),
        (own([FIRST, SECOND], [-1.0, None]), "token_id:9 has -2.0 there, and None by itself"),
        (own([FIRST, SECOND], [math.nan, -2.0]), "of another token"),
        (own([FIRST, SECOND], [-1.0]), "2 tokens with 2 sets"),
        (own([FIRST, SECOND], ["-1.0", -2.0]), "unexpected shape"),
    ],
)
def test_log_probabilities_of_another_token_are_a_fault(chunk, named):
    with pytest.raises(ConnectionError, match=named):
        reader().feed(chunk)


@pytest.mark.parametrize("chosen", [..., None, [], [-1.0, -2.0], [-1.00001, -1.99999]])
def test_log_probabilities_of_the_chosen_token_itself_are_taken(chosen):
    steps = reader().feed(own([FIRST, SECOND], chosen))
    assert [step.flag_probs for step in steps] == [
        (math.exp(-3.0), math.exp(-4.0)),
        (math.exp(-5.0), math.exp(-6.0)),
    ]


def test_a_refusal_inside_a_stream_is_a_refusal_before_the_first_step_only():
    refused = b'data: {"error": {"message": "Token id 5000 is out of vocabulary", "code": 400}}\n\n'
    with pytest.raises(RefusalError, match="Token id 5000 is out of vocabulary"):
        reader().feed(refused)
    late = reader()
    late.feed(event([9], TOPS[:1]))
    with pytest.raises(ConnectionError, match="out of vocabulary"):
        late.feed(refused)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_step_that_was_not_measured_is_nan_and_the_last(missing):
    one = reader()
    steps = one.feed(event([9, 10], [TOPS[0], {10: -1.0, 5: missing, 6: -1.0}]) + event([1], TOPS[2:], "stop"))
    assert [step.token_id for step in steps] == [9, 10]
    assert math.isnan(steps[1].flag_probs[0]) and one.finish == "nan"


def test_a_line_without_end_is_a_fault():
    one = reader()
    with pytest.raises(ConnectionError, match="more than"):
        for _ in range(20):
            one.feed(b"x" * (1 << 20))


def twenty(*, without=(), chosen=9, value=-30.0):
    """The 20 most likely of a server, ids 100 to 119 with log-probabilities -1 to -20, and the chosen token."""
    top = {100 + i: -1.0 - i for i in range(TOP) if 100 + i not in without}
    return {chosen: value, **top}


@pytest.mark.parametrize(
    ("top", "flags", "expected"),
    [
        (twenty(), [5], [-20.0]),  # absent: at most the twentieth, not the chosen token's -30
        (twenty(value=-0.5), [5], [-20.0]),
        (twenty(), [103, 5], [-4.0, -20.0]),
        ({100 + i: -1.0 - i for i in range(TOP)}, [5], [-20.0]),  # the chosen one is among the 20
        (twenty(without=[119]), [5], [-19.0]),  # and is the last of them, or the server shows 19: below the 19th it is
    ],
)
def test_an_absent_flag_is_bounded_by_the_twentieth(top, flags, expected):
    chosen = next(iter(top))
    one = reader(measured=flags, banned=[], upper_bound=True)
    (step,) = one.feed(event([chosen], [top]))
    assert step.flag_probs == pytest.approx([math.exp(value) for value in expected])


@given(st.lists(st.floats(-50, 0), min_size=40, max_size=40), st.integers(0, 39), st.integers(0, 39))
def test_an_upper_bound_is_never_below_the_probability(logits, flag, chosen):
    total = math.log(math.fsum(map(math.exp, logits)))
    logprobs = {i: z - total for i, z in enumerate(logits)}
    ranked = sorted(logprobs, key=logprobs.__getitem__, reverse=True)[:TOP]
    top = {i: logprobs[i] for i in [chosen, *ranked]}
    (step,) = reader(measured=[flag], banned=[], eos_ids=[], upper_bound=True).feed(event([chosen], [top]))
    assert step.flag_probs[0] >= min(1.0, math.exp(logprobs[flag]))


@pytest.mark.parametrize(
    "top", [twenty(without=[105, 106]), {9: -1.0, 0: -9999.0}, {**twenty(), 119: -9999.0}, {9: -1.0}]
)
def test_fewer_than_twenty_bound_nothing(top):
    with pytest.raises(ConnectionError, match="not the 20 largest"):
        reader(measured=[5], banned=[5], upper_bound=True).feed(event([9], [top]))


def test_a_flag_that_was_masked_before_it_was_measured_is_unjudged():
    (step,) = reader(measured=[5], banned=[5]).feed(event([9], [{9: -1.0, 5: -9999.0}]))
    assert math.isnan(step.flag_probs[0])


def test_a_nan_among_the_twenty_bounds_nothing():
    (step,) = reader(measured=[5], upper_bound=True).feed(event([9], [{**twenty(), 103: None}]))
    assert math.isnan(step.flag_probs[0])
