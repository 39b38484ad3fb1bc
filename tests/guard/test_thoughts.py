"""Thoughts of real templates, Qwen3's and gpt-oss's, from rendered prompt to released text."""

from __future__ import annotations

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_real_tokenizers import world
from thinking import ASK, encoded, limits, written
from tiny import build

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.backends.scripted import ScriptedBackend
from redflag.errors import RedflagError
from redflag.guard.guard import Guard
from redflag.guard.response import adrive
from redflag.judges import Verdict
from redflag.thoughts import thinks_by_itself, thought_marks
from redflag.trace import Alarm, Escalation, Forced, Halt, Reflection, Step, Text, Thought, read_traces, write_traces
from redflag.watching.policy import Policy, Reflect
from redflag.watching.thresholds import Thresholds

NAMES = ("qwen3", "gptoss")


def guard_of(name, ids, policy=None, high=None, thresholds=None, judge=None, **options):
    tokenizer, spec = world(name)
    steps = [Step(i, (high or {}).get(at, (0.01, 0.01))) for at, i in enumerate(ids)]
    backend = ScriptedBackend(steps, {tokenizer.eos_token_id}, **options)
    return Guard(backend, tokenizer, spec, thresholds or limits(spec), policy, judge, "on")


def parts(events):
    return tuple("".join(event.text for event in events if isinstance(event, kind)) for kind in (Thought, Text))


@pytest.mark.parametrize("name", NAMES)
def test_a_thought_is_told_from_the_answer_by_ids_and_hidden_unless_it_is_asked_for(name):
    ids, border = written(name)
    hidden = guard_of(name, ids).generate(ASK)
    assert (hidden.thought, hidden.text, hidden.verdict) == ("", "Hello there", "completed")
    assert hidden.trace.thought_tokens == border and hidden.trace.token_ids == ids
    assert hidden.trace.facts().released == len(ids) - border
    shown = guard_of(name, ids, Policy(thoughts="show")).generate(ASK)
    assert (shown.thought.rstrip("\n"), shown.text) == ("Let me think.", "Hello there")


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_with_thinking_ends_inside_the_thought_and_is_else_the_stock_one(name):
    tokenizer, _ = world(name)
    guard = guard_of(name, [])
    off = guard.respond(ASK, thinking=False).request.token_ids
    on = guard.respond(ASK, thinking=True).request.token_ids
    stock = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert tokenizer.decode(on) == stock + thought_marks(tokenizer).opening
    assert tokenizer.decode(off) != tokenizer.decode(on)
    assert guard.respond(ASK).request.token_ids == on, "the guard's own default"
    prefilled = guard.respond([*ASK, {"role": "assistant", "content": "Yes"}], thinking=True)
    assert tokenizer.decode(prefilled.request.token_ids) == tokenizer.decode(off) + "Yes", "an answer's beginning"
    assert prefilled.trace.answer_at == 0


def test_what_a_template_does_by_itself_decides_where_the_operator_leaves_it_to_it():
    for name, thinks in (("qwen3", True), ("gptoss", True), ("llama3_1", False)):
        tokenizer, spec = world(name)
        assert thinks_by_itself(tokenizer) == thinks
        guard = Guard(ScriptedBackend([]), tokenizer, spec, limits(spec), thinking="template")
        assert guard.thinks == thinks == (guard.respond(ASK).trace.answer_at is None)
        assert Guard(ScriptedBackend([]), tokenizer, spec, limits(spec)).thinks is False


def test_thinking_is_refused_where_there_is_no_thinking_mode():
    tokenizer, spec = world("llama3_1")
    with pytest.raises(RedflagError, match="thinking must be off for this model"):
        Guard(ScriptedBackend([]), tokenizer, spec, limits(spec), thinking="on")
    guard = Guard(ScriptedBackend([]), tokenizer, spec, limits(spec))
    assert not guard.can_think and guard.respond(ASK, thinking=False)
    with pytest.raises(RedflagError, match="thinking must be off for this model"):
        guard.respond(ASK, thinking=True)
    with pytest.raises(RedflagError, match="thinking must be one of"):
        Guard(ScriptedBackend([]), tokenizer, spec, limits(spec), thinking="yes")


@pytest.mark.parametrize("thoughts", ["hide", "show"])
def test_an_alarm_in_a_thought_halts_and_no_content_comes(thoughts):
    ids, _ = written("qwen3")
    result = guard_of("qwen3", ids, Policy(thoughts=thoughts), {2: (0.9, 0.0)}).generate(ASK)
    assert (result.text, result.verdict) == ("", "halted")
    assert result.thought == ("Let me" if thoughts == "show" else "")
    assert isinstance(result.events[-1], Halt) and result.events[-1].category == "harm"


def test_a_thought_may_name_what_an_answer_may_not():
    _, spec = world("qwen3")
    ids, border = written("qwen3")
    own = limits(spec, 0.5, 0.95)
    high = {at: (0.9, 0.0) for at in range(border)}
    assert guard_of("qwen3", ids, high=high, thresholds=own).generate(ASK).text == "Hello there"
    assert guard_of("qwen3", ids, high=high).generate(ASK).verdict == "halted"
    assert guard_of("qwen3", ids, high={border: (0.9, 0.0)}, thresholds=own).generate(ASK).verdict == "halted"


def test_stop_texts_are_the_answers_own():
    ids, _ = written("qwen3", "One STOP two.", "Hello STOP there")
    sampling = Sampling(stop=("STOP", "\n\n"))
    result = guard_of("qwen3", ids, Policy(thoughts="show")).generate(ASK, sampling)
    assert (result.thought, result.text) == ("One STOP two.\n", "Hello ")


@pytest.mark.parametrize("thoughts, shown", [("hide", ""), ("show", "Let me think.\n")])
def test_a_response_that_ends_in_its_thought_has_no_content(thoughts, shown):
    tokenizer, _ = world("qwen3")
    ids, border = written("qwen3")
    for cut, reason in ((ids[: border - 1], "length"), ([*ids[: border - 1], tokenizer.eos_token_id], "stop")):
        result = guard_of("qwen3", cut, Policy(thoughts=thoughts)).generate(ASK)
        assert (result.thought, result.text, result.events[-1].reason) == (shown, "", reason)
        assert result.trace.thought_tokens == len(cut)


def test_the_words_of_a_mark_end_nothing_and_gpt_oss_in_another_channel_stays_in_its_thought():
    tokenizer, _ = world("qwen3")
    ids = [*encoded(tokenizer, "a </think> b"), *written("qwen3")[0]]
    assert tokenizer.convert_tokens_to_ids("</think>") not in encoded(tokenizer, "a </think> b")
    result = guard_of("qwen3", ids, Policy(thoughts="show")).generate(ASK)
    assert (result.thought, result.text) == ("a </think> bLet me think.\n", "Hello there")
    tokenizer, _ = world("gptoss")
    call = tokenizer("x<|end|><|start|>assistant<|channel|>commentary<|message|>SECRET", add_special_tokens=False)
    result = guard_of("gptoss", call["input_ids"], Policy(thoughts="show")).generate(ASK)
    assert (result.thought, result.text) == ("x", "")


PIECES = ["<think>", "</think>", "</th", "ink>", "think", "<", "/", ">", "\n", "\n\n", "SECRET", " é", "👩‍👩‍👧", "STOP"]


@settings(max_examples=150)
@given(
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(PIECES), max_size=8),
    st.lists(st.sampled_from([*PIECES[2:], "Yes"]), max_size=6),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(["steps", "sentence", "end"]),
    st.sampled_from(["hide", "show"]),
)
def test_whatever_stands_around_the_border_each_part_gets_its_own_text(
    name, thought, answer, ends, hold_back, release, thoughts
):
    tokenizer, _ = world(name)
    marks = thought_marks(tokenizer)
    # Piece by piece, so that marks and characters fall across tokens in every way.
    early = [i for piece in thought for i in encoded(tokenizer, piece)]
    late = [i for piece in answer for i in encoded(tokenizer, piece)]
    assert tokenizer.convert_tokens_to_ids("</think>") not in early or name != "qwen3"
    ids = [*early, *(marks.end_ids if ends else ()), *(late if ends else ()), tokenizer.eos_token_id]
    policy = Policy(hold_back=hold_back, release=release, thoughts=thoughts)
    result = guard_of(name, ids, policy).generate(ASK)
    spelled = tokenizer.decode(early, skip_special_tokens=True)
    assert result.thought == (spelled if thoughts == "show" else "")
    expected = tokenizer.decode(late, skip_special_tokens=True) if ends else ""
    assert result.text == (expected.lstrip(marks.before_answer) if marks.before_answer else expected)
    assert result.verdict == "completed"


@pytest.mark.parametrize("where", ["thought", "answer"])
def test_a_reflection_in_either_part_goes_back_to_where_it_came_from(where):
    tokenizer, spec = world("qwen3")
    ids, border = written("qwen3")
    at = 1 if where == "thought" else border + 1

    def play(token_ids, sampling):
        if spec.ids[0] in token_ids:
            return [Step(i, (0.0, 0.0)) for i in encoded(tokenizer, "well;")]
        done = len(token_ids) - prompt
        return [Step(i, (0.9 if n == at else 0.0, 0.0)) for n, i in enumerate(ids) if n >= done]

    def verdict(token_ids, sampling, watch):
        return [Step(0, (0.1, 0.9))]

    reflect = Reflect(cue=" hm: ", verdict_cue=" so ", words=(" x", " y"), stop=(";",), max_tokens=8)
    policy = Policy(default="reflect", reflect=reflect, thoughts="show")
    backend = ScriptedBackend(play, {tokenizer.eos_token_id}, watched=verdict)
    guard = Guard(backend, tokenizer, spec, limits(spec), policy, thinking="on")
    prompt = len(guard.respond(ASK).request.token_ids)
    result = guard.generate(ASK)
    assert (result.thought, result.text) == ("Let me think.\n", "Hello there")
    assert [type(event) for event in result.events if isinstance(event, Reflection)] == [Reflection]
    assert result.trace.thought_tokens == border


@pytest.mark.parametrize("thoughts, kept", [("hide", 0), ("show", 2)])
def test_a_forced_flag_in_a_thought_takes_back_what_was_not_shown_and_the_thought_goes_on(thoughts, kept):
    tokenizer, spec = world("qwen3")
    ids, _ = written("qwen3", "One two three")
    rest, border = written("qwen3", "no.", "I can not.")

    def play(token_ids, sampling):
        return (
            [Step(i, (0.0, 0.0)) for i in rest]
            if spec.ids[0] in token_ids
            else [Step(i, (0.9 if n == 2 else 0.0, 0.0)) for n, i in enumerate(ids)]
        )

    backend = ScriptedBackend(play, {tokenizer.eos_token_id})
    guard = Guard(backend, tokenizer, spec, limits(spec), Policy(default="force", thoughts=thoughts), thinking="on")
    result = guard.generate(ASK)
    (forced,) = (event for event in result.events if isinstance(event, Forced))
    assert (forced.position, len(forced.token_ids)) == (kept, 3 - kept)
    assert result.text == "I can not." and result.trace.thought_tokens == kept + border
    assert result.thought == ("One twono.\n" if thoughts == "show" else "")


@pytest.mark.parametrize("where, read", [("thought", "Let me"), ("answer", "\n\nHello")])
def test_a_second_judge_reads_the_part_that_alarmed_alone(where, read):
    seen = []

    def judge(messages, answer):
        seen.append(answer)
        return Verdict(0.0, "fine")

    tokenizer, spec = world("qwen3")
    ids, border = written("qwen3")
    at = 1 if where == "thought" else border + 1

    def play(token_ids, sampling):
        done = len(token_ids) - prompt
        return [Step(i, (0.9 if n == at else 0.0, 0.0)) for n, i in enumerate(ids) if n >= done]

    backend = ScriptedBackend(play, {tokenizer.eos_token_id})
    guard = Guard(backend, tokenizer, spec, limits(spec), Policy(default="escalate"), judge, "on")
    prompt = len(guard.respond(ASK).request.token_ids)
    result = guard.generate(ASK)
    assert result.text == "Hello there" and any(isinstance(event, Escalation) for event in result.events)
    assert seen == [read]


def test_a_trace_with_a_thought_comes_back_as_it_was_written(tmp_path):
    ids, _ = written("qwen3")
    whole = [guard_of("qwen3", ids, Policy(thoughts=how)).generate(ASK).trace for how in ("hide", "show")]
    cut = guard_of("qwen3", ids[:3], Policy(thoughts="show")).generate(ASK).trace
    write_traces(tmp_path / "traces.jsonl", [*whole, cut], text=True)
    assert list(read_traces(tmp_path / "traces.jsonl")) == [*whole, cut]


def test_a_local_model_thinks_through_both_loops():
    """A tiny random model never closes its thought by itself: it is cut, and nothing of it is content."""
    tokenizer, spec = world("qwen3")
    torch.manual_seed(0)
    model = build("qwen3", len(tokenizer))
    backend = HFBackend(model, tokenizer, spec)
    named = {"run_id": spec.run_id, "template_hash": spec.template_hash}
    guard = Guard(backend, tokenizer, spec, Thresholds.manual(1.0, spec.categories, **named), thinking="on")
    sampling = Sampling(max_new_tokens=12, seed=1)
    result = guard.generate(ASK, sampling)
    assert (result.text, result.trace.thought_tokens, result.trace.answer_at) == ("", 12, None)

    class Async:
        eos_ids, logprob_mode, upper_bound = backend.eos_ids, backend.logprob_mode, False

        async def astream(self, *arguments):
            for step in backend.stream(*arguments):
                yield step

        async def aclose(self):
            pass

    async def collect():
        response = guard.respond(ASK, sampling)
        return [event async for event in adrive(response, Async())], response.trace

    events, trace = asyncio.run(collect())
    assert parts(events) == ("", "") and trace.token_ids == result.trace.token_ids
    assert not any(isinstance(event, Alarm) for event in events)
