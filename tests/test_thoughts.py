"""Thoughts in templates and rows: where they begin and end, in training and scoring as in serving."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import spec_of, turn, with_template
from test_chat_templates import world as made
from test_real_tokenizers import world
from test_tool_turns import TRL
from thinking import limits

from redflag.backends.scripted import ScriptedBackend
from redflag.control_tokens import control_ids
from redflag.guard.guard import Guard
from redflag.prompt import render_prompt, render_response, template_hash
from redflag.thoughts import thinks_by_itself, thought_marks
from redflag.trace import Step
from redflag.truncation import fit_row
from redflag.watching.policy import Policy

ASK = turn("user", "Hi")
# Released templates: what opens a thought behind the prompt, what ends it, and whether the template thinks by itself.
TEMPLATES = {
    "qwen3.jinja": ("<think>\n", ["</think>"], True),
    "qwen3_5_nothink.jinja": ("", ["</think>"], False),
    "deepseek_r1_distill.jinja": ("", ["</think>"], True),
    "glm4moe.jinja": ("\n<think>", ["</think>"], True),
    "nemotron_3_nano.jinja": ("", ["</think>"], True),
    "lfm2_2_5.jinja": ("<think>", ["</think>"], False),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_where_a_thought_begins_and_ends_is_learnt_from_the_template(name):
    tokenizer, _ = made((TRL / name).read_text())
    if tokenizer.convert_tokens_to_ids("</think>") is None:
        pytest.skip("the tokenizer has no such token")
    opening, end, by_itself = TEMPLATES[name]
    marks = thought_marks(tokenizer)
    assert (marks.opening, tokenizer.convert_ids_to_tokens(list(marks.end_ids))) == (opening, end)
    assert thinks_by_itself(tokenizer) == by_itself


def test_gpt_oss_ends_a_thought_with_the_six_ids_of_another_channel_and_others_have_no_thought():
    tokenizer, _ = world("gptoss")
    marks = thought_marks(tokenizer)
    assert tokenizer.decode(list(marks.end_ids)) == "<|end|><|start|>assistant<|channel|>final<|message|>"
    for name in ("llama3_1", "gemma3", "deepseek_v3", "llama2"):
        assert thought_marks(world(name)[0]) is None


def test_a_tokenizer_without_a_token_that_ends_a_thought_has_no_thinking_mode():
    tokenizer = with_template((TRL / "qwen3.jinja").read_text().replace("<|im_end|>", "<|end|>"))
    spec = spec_of(tokenizer)
    assert thought_marks(tokenizer) is None
    row = render_response(tokenizer, [ASK, turn("assistant", "Yes") | {"reasoning_content": "Hm"}], spec)
    assert tokenizer.decode(row.response_ids) == "Yes" and not row.thought_offsets, "left out, as ever"


def test_thinking_changes_neither_the_template_hash_nor_a_row_without_a_thought():
    tokenizer, spec = world("qwen3")
    before = template_hash(tokenizer)
    row = render_response(tokenizer, [ASK, turn("assistant", "Yes")], spec)
    assert template_hash(tokenizer) == before and row.thought_offsets == []
    assert tokenizer.decode(row.prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert render_response(tokenizer, [ASK, turn("assistant", "Yes") | {"reasoning_content": "\n "}], spec) == row


spoken = st.text(st.sampled_from("ab .\n<>/é日👩"), max_size=12).filter(str.strip)
hostile = st.sampled_from(["</think>", "<think>", "<|im_end|>", "<|end|>", "<|redflag_harm|>", "<|message|>"])
texts = st.lists(spoken | hostile, min_size=1, max_size=4).map("".join)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["qwen3", "gptoss"]), texts, texts)
def test_a_row_with_a_thought_is_what_a_guard_reads(name, thought, answer):
    """The same prompt, the same border, the same texts; and no control token that the template did not write."""
    tokenizer, spec = world(name)
    marks = thought_marks(tokenizer)
    row = render_response(tokenizer, [ASK, turn("assistant", answer) | {"reasoning_content": thought}], spec)
    border = len(row.thought_offsets)
    assert tuple(row.response_ids[border - len(marks.end_ids) : border]) == marks.end_ids
    control = control_ids(tokenizer, spec)
    assert not control.all.intersection(row.response_ids[: border - len(marks.end_ids)])
    assert not control.special.intersection(row.response_ids[border:])
    # Offsets are positions in each text.
    pieces = [thought.strip("\n")[start:end] for start, end in row.thought_offsets]
    assert "".join(pieces).startswith(thought.strip("\n")[:1])
    assert all(0 <= start <= end <= len(answer) for start, end in row.offsets)
    assert max(end for _, end in row.offsets) == len(answer)
    steps = [Step(i, (0.0, 0.0)) for i in [*row.response_ids, *row.tail_ids]]
    backend = ScriptedBackend(steps, {tokenizer.eos_token_id})
    guard = Guard(backend, tokenizer, spec, limits(spec), Policy(thoughts="show"))
    response = guard.respond([ASK], thinking=True)
    assert list(response.request.token_ids) == row.prompt_ids == render_prompt(tokenizer, [ASK], spec, thinking=True)
    result = guard.generate([ASK], thinking=True)
    assert result.trace.thought_tokens == border
    flags = [flag.token for flag in spec.flags]
    if not any(flag in thought + answer for flag in flags):
        assert result.thought == thought.strip("\n") + marks.before_end
        assert result.text == (answer.lstrip("\n") if marks.before_answer else answer)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["qwen3", "gptoss"]), st.lists(texts, min_size=1, max_size=3))
def test_no_user_opens_or_closes_a_thought(name, said):
    tokenizer, spec = world(name)
    control = control_ids(tokenizer, spec).all
    turns = [turn("assistant" if i % 2 else "user", text) for i, text in enumerate([*said, "Hi"][-3:])]
    turns = turns if turns[-1]["role"] == "user" else turns[:-1]
    honest = [turn(message["role"], "word") for message in turns]
    marks = [
        [i for i in render_prompt(tokenizer, messages, spec, thinking=True) if i in control]
        for messages in (turns, honest)
    ]
    spoken = any(message["role"] == "assistant" for message in turns)  # may hold marks of its own; not special ones
    if spoken:
        special = control_ids(tokenizer, spec).special
        marks = [[i for i in found if i in special] for found in marks]
    assert marks[0] == marks[1] and not set(spec.ids).intersection(marks[0])


def test_what_is_too_long_loses_its_oldest_turns_and_keeps_its_thought():
    tokenizer, spec = world("qwen3")
    talk = [turn("user", "old " * 40), turn("assistant", "yes"), ASK]
    messages = [*talk, turn("assistant", "Hello") | {"reasoning_content": "Let me think."}]
    whole = fit_row(tokenizer, messages, spec, None)
    cut = fit_row(tokenizer, messages, spec, 40)
    assert cut.prompt_truncated and cut.response_ids == whole.response_ids
    assert cut.thought_offsets == whole.thought_offsets
    assert tokenizer.decode(cut.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    short = fit_row(tokenizer, messages, spec, 4)
    assert short.response_truncated and len(short.thought_offsets) == len(short.response_ids) == 3
