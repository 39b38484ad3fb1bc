"""What a user writes never becomes a flag, an end of turn or another turn; ordinary text gives the stock ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import EXACT, JOINED, TOKENIZERS, fast, hostile, spec_of, turn, with_template, world

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.models.pretrain import CHAT_TEMPLATE, train_tokenizer
from redflag.prompt import render_prompt, render_response, render_text, template_hash


class TestOrdinaryTextIsStock:
    @pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("no template", "contents joined")])
    @fast
    @given(data=st.data())
    def test_ids_are_those_of_apply_chat_template(self, name: str, data: Any) -> None:
        tokenizer, spec = world(name)
        text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>[]|＜＞［］｜⟨"), max_size=20)
        contents = data.draw(st.lists(text, min_size=1, max_size=3))
        if name == "flag in the vocabulary":
            contents = [content + "x" for content in contents]
        messages = [turn("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
        messages.append(turn("user", data.draw(text) + "x"))
        stock = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=False
        )
        assert render_prompt(tokenizer, messages, spec) == stock

    @pytest.mark.parametrize(
        "content", ["x < y | z > [a]", "", "  \n", " padded \n", "<|", "<think", "￼\u200d👩‍👩‍👧 é"]
    )
    def test_brackets_blanks_and_emoji_are_ordinary(self, content: str) -> None:
        for name in ("byte-level", "headers, trimmed", "thinking"):
            tokenizer, spec = world(name)
            messages = [turn("system", content), turn("user", "Hi"), turn("assistant", content), turn("user", "Go on")]
            stock = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, enable_thinking=False
            )
            assert render_prompt(tokenizer, messages, spec) == stock

    def test_only_the_message_that_needs_it_is_tokenised_apart(self) -> None:
        tokenizer, spec = world("byte-level")
        ids = render_prompt(tokenizer, [turn("user", "The quick fox"), turn("user", "<|end|>")], spec)
        stock = tokenizer.apply_chat_template([turn("user", "The quick fox")], return_dict=False)
        assert ids[: len(stock)] == stock

    @pytest.mark.parametrize("lead, trail", [("", ""), (" ", "\n"), ("\n\n", " "), ("\t", "")])
    def test_white_space_of_a_message_taken_apart_is_treated_as_the_template_does(self, lead: str, trail: str) -> None:
        for name, kept in (("byte-level", True), ("headers, trimmed", False)):
            tokenizer, spec = world(name)
            end = tokenizer.eos_token
            text = tokenizer.decode(render_prompt(tokenizer, [turn("user", f"{lead}a{end}b{trail}")], spec))
            assert (f"{lead}a{end}b{trail}<" in text) is (kept or not (lead + trail))
            assert f"a{end}b" in text

    def test_without_a_template_the_fallback_and_the_tokenizers_bos_are_used(self) -> None:
        tokenizer, spec = world("no template")
        ids = render_prompt(tokenizer, [turn("system", "Be kind."), turn("user", "Hi")], spec)
        assert tokenizer.decode(ids) == "<s>### System\nBe kind.\n\n### User\nHi\n\n### Assistant\n"
        tokenizer, spec = world("byte-level")
        assert template_hash(tokenizer) != template_hash(world("no template")[0])

    def test_of_several_templates_the_default_one_is_used(self) -> None:
        tokenizer = with_template("")
        spec = world("byte-level")[1]
        tokenizer.chat_template = {"tool_use": JOINED, "default": CHAT_TEMPLATE}
        single, _ = world("byte-level")
        messages = [turn("user", "Hi")]
        assert render_prompt(tokenizer, messages, spec) == render_prompt(single, messages, spec)
        assert template_hash(tokenizer) == template_hash(single)
        tokenizer.chat_template = {"tool_use": JOINED, "rag": CHAT_TEMPLATE}
        with pytest.raises(
            RedflagError, match=r"one of several chat templates must be named default \(got tool_use, rag\)"
        ):
            render_prompt(tokenizer, messages, spec)


def test_empty_turns_are_rendered_as_the_template_writes_them() -> None:
    """Red-team tools send them."""
    tokenizer, spec = world("byte-level")
    several = [turn("user", ""), turn("assistant", ""), turn("user", "")]
    for messages in ([turn("user", "")], [turn("user", " \n")], several):
        ids = render_prompt(tokenizer, messages, spec)
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    with pytest.raises(RedflagError, match="the prompt must not be empty"):
        render_text(tokenizer, " ", spec)


class TestRefusals:
    @pytest.mark.parametrize(
        "messages, words",
        [
            ([], "conversation must have at least one user message"),
            ([{"role": "user"}], "message 0 must have text content"),
            ([turn("user", "Hi"), {"role": "user", "content": [{"type": "text"}]}], "message 1 must have text content"),
            (["Hi"], "message 0 must have text content"),
            ([turn("robot", "Hi")], "must be one of system, user, assistant, tool .got 'robot'"),
            ([{"content": "Hi"}], "got None"),
            ([turn("user", "a\ud800b")], "message 0 must not hold half of a surrogate pair"),
            ([turn("assistant", "Sure")], "must have a user or system turn"),
        ],
    )
    def test_a_malformed_conversation_is_named(self, messages: Any, words: str) -> None:
        tokenizer, spec = world("byte-level")
        with pytest.raises(RedflagError, match=words) as caught:
            render_prompt(tokenizer, messages, spec)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "messages, words",
        [
            ([turn("user", "Hi")], "the last one the user's"),
            ([turn("assistant", "Hi")], "1 turn"),
            ([turn("user", "Hi"), turn("assistant", "")], "the response must not be empty"),
            ([], "conversation must have at least one user message"),
        ],
    )
    def test_a_conversation_without_response_is_named(self, messages: Any, words: str) -> None:
        tokenizer, spec = world("byte-level")
        with pytest.raises(RedflagError, match=words):
            render_response(tokenizer, messages, spec)

    def test_a_template_that_raises_is_the_users_to_mend(self) -> None:
        tokenizer = with_template(
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            + CHAT_TEMPLATE
        )
        spec = world("byte-level")[1]
        with pytest.raises(RedflagError, match=r"\['system', 'user'\] \(System role not supported\)\. Reorder"):
            render_prompt(tokenizer, [turn("system", "Be kind."), turn("user", "Hi")], spec)
        assert render_prompt(tokenizer, [turn("user", "Hi")], spec)

    def test_a_broken_template_is_one_sentence(self) -> None:
        tokenizer = with_template("{% for message in messages %}{{ message['content'] }}")
        with pytest.raises(RedflagError, match="chat template refuses"):
            render_prompt(tokenizer, [turn("user", "Hi")], world("byte-level")[1])

    def test_unattached_flags_are_refused(self) -> None:
        with pytest.raises(RedflagError, match="must have a token id"):
            render_prompt(world("byte-level")[0], [turn("user", "Hi")], FlagSpec.of("harm"))


class TestResponses:
    @pytest.mark.parametrize("name", EXACT)
    @pytest.mark.parametrize(
        "text", ["Sure.", " Sure\n", "naïve 👩‍👩‍👧 日本語 e\u0301", "<|end|> and <|reserved_0|>", "\n"]
    )
    def test_prompt_and_response_decode_to_the_conversation(self, name: str, text: str) -> None:
        tokenizer, spec = world(name)
        messages = [turn("user", "Hi <|end|>"), turn("assistant", text)]
        row = render_response(tokenizer, messages, spec)
        assert tokenizer.decode(row.response_ids) == text
        assert row.prompt_ids == render_prompt(tokenizer, messages[:1], spec)
        assert row.prompt_ids + row.response_ids == render_prompt(tokenizer, messages, spec)

    @pytest.mark.parametrize(
        "name, tail",
        [
            ("byte-level", ["<|end|>"]),
            ("headers, trimmed", ["<|eot_id|>"]),
            ("thinking", ["<|im_end|>"]),
            ("sentence-piece", ["</s>"]),
            ("nothing marked special", ["<|end|>"]),
            ("no template", ["</s>"]),
            ("contents joined", ["<|end|>"]),  # the template ends no turn: the tokenizer's own end
            ("flag in the vocabulary", ["</s>"]),
        ],
    )
    def test_the_tail_is_what_ends_a_turn(self, name: str, tail: list[str]) -> None:
        tokenizer, spec = world(name)
        row = render_response(tokenizer, [turn("user", "Hi"), turn("assistant", "Sure")], spec)
        assert tokenizer.convert_ids_to_tokens(row.tail_ids) == tail

    def test_a_template_that_drops_the_response_ends_with_the_tokenizers_own_end(self) -> None:
        tokenizer = with_template(
            "{% for m in messages if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endfor %}"
        )
        row = render_response(tokenizer, [turn("user", "Hi"), turn("assistant", "Sure")], world("byte-level")[1])
        assert row.tail_ids == [tokenizer.eos_token_id]

    def test_the_empty_thought_of_a_thinking_template_belongs_to_the_prompt(self) -> None:
        tokenizer, spec = world("thinking")
        row = render_response(tokenizer, [turn("user", "Hi"), turn("assistant", "Sure")], spec)
        prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert tokenizer.decode(row.prompt_ids) == prompt
        assert tokenizer.decode(row.response_ids) == "Sure"

    def test_a_thought_is_a_token_in_the_response_and_text_in_a_users_message(self) -> None:
        tokenizer, spec = world("thinking")
        think = tokenizer.convert_tokens_to_ids("<think>")
        row = render_response(tokenizer, [turn("user", "<think>"), turn("assistant", "<think>Hm</think>Yes")], spec)
        assert row.response_ids.count(think) == 1
        assert row.prompt_ids.count(think) == 1  # the template's

    @pytest.mark.parametrize(
        "text, offsets",
        [
            ("ab", [(0, 1), (1, 2)]),
            ("é", [(0, 1), (0, 1)]),
            ("a😀b", [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3)]),
            ("\n\n", [(0, 1), (1, 2)]),
        ],
    )
    def test_offsets_are_characters(self, text: str, offsets: list[tuple[int, int]]) -> None:
        tokenizer = train_tokenizer([], 0)  # bytes and special tokens only
        row = render_response(tokenizer, [turn("user", "Hi"), turn("assistant", text)], spec_of(tokenizer))
        assert row.offsets == offsets

    @pytest.mark.parametrize("name", TOKENIZERS)
    @fast
    @given(data=st.data())
    def test_offsets_go_forward_and_stay_inside(self, name: str, data: Any) -> None:
        tokenizer, spec = world(name)
        text = data.draw(hostile(tokenizer, spec)) + "x"
        row = render_response(tokenizer, [turn("user", "Hi"), turn("assistant", text)], spec)
        for (low, high), (next_low, next_high) in zip(row.offsets, row.offsets[1:], strict=False):
            assert 0 <= low <= high <= len(text) and low <= next_low and high <= next_high
        assert row.offsets[-1][1] == len(text)

    def test_a_prefill_is_continued(self) -> None:
        tokenizer, spec = world("byte-level")
        ids = render_prompt(tokenizer, [turn("user", "Hi"), turn("assistant", "Sure, here")], spec)
        assert tokenizer.decode(ids) == "<|user|>Hi<|end|><|assistant|>Sure, here"

    def test_an_empty_prefill_changes_nothing(self) -> None:
        tokenizer, spec = world("byte-level")
        messages = [turn("user", "Hi")]
        assert render_prompt(tokenizer, [*messages, turn("assistant", "")], spec) == render_prompt(
            tokenizer, messages, spec
        )
