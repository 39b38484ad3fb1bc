"""A conversation that is too long keeps its beginning, its system turn, and the place where an answer begins."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_models import INST
from templates import byte_level, fast, hostile, rendered, turn, with_template, world

import redflag.truncation as truncation
from redflag.data.rows import Row
from redflag.flags import Flag, FlagSpec
from redflag.prompt import render_prompt
from redflag.scoring.fitting import fit
from redflag.training.encode import build_dataset, encode
from redflag.truncation import fit_prompt, fit_row

WORLDS = ("byte-level", "headers, trimmed", "thinking", "sentence-piece", "no template", "contents twice")


def alternating() -> tuple[Any, FlagSpec]:
    """Mistral's template: turns must alternate, and the system turn stands in the last of the user's."""
    tokenizer = byte_level(["<s>", "</s>", "[INST]", "[/INST]", "[control_8]"], bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = INST
    return tokenizer, FlagSpec((Flag("harm", "[control_8]", id=tokenizer.convert_tokens_to_ids("[control_8]")),))


def long_talk(turns: int = 6, system: str = "Be kind.") -> list[dict[str, str]]:
    talk = [turn("system", system)] if system else []
    for i in range(turns):
        talk += [turn("user", f"question {i} " * 4), turn("assistant", f"answer {i} " * 4)]
    return [*talk, turn("user", "the last question of all")]


class TestPrompts:
    @pytest.mark.parametrize("name", WORLDS)
    @fast
    @given(data=st.data())
    def test_what_is_left_is_a_prompt_that_fits(self, name: str, data: Any) -> None:
        tokenizer, spec = world(name)
        text = hostile(tokenizer, spec)
        talk = [turn("system", data.draw(text))] if data.draw(st.booleans()) else []
        for _ in range(data.draw(st.integers(0, 3))):
            talk += [turn("user", data.draw(text) + "x"), turn("assistant", data.draw(text))]
        talk = rendered(name, [*talk, turn("user", data.draw(text) + "x")])
        whole = render_prompt(tokenizer, talk, spec)
        limit = data.draw(st.integers(1, len(whole) + 2))
        ids = fit_prompt(tokenizer, talk, spec, limit)
        assert 1 <= len(ids) <= limit
        if len(whole) <= limit:
            assert ids == whole
        bos = tokenizer.bos_token_id
        if limit > 1 and bos is not None and whole[0] == bos:
            assert ids[0] == bos
        end = render_prompt(tokenizer, [turn("user", "x")], spec)
        end = end[len(end) - end[::-1].index(tokenizer.encode("x", add_special_tokens=False)[-1]) :]
        rest = ids[1:] if ids[0] == bos else ids
        assert rest[-len(end) :] == end[-len(rest) :] if end and rest else True
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(spec.ids)
        special.discard(tokenizer.unk_token_id)
        marks, written = ([i for i in some if i in special] for some in (ids, whole))
        assert not set(spec.ids) & set(ids) and len(marks) <= len(written) and set(marks) <= set(written)

    def test_whole_exchanges_go_first_and_the_system_turn_stays(self) -> None:
        tokenizer, spec = world("headers, trimmed")
        talk = long_talk()
        for kept in range(6):  # exchanges before the last question
            shorter = [talk[0], *talk[len(talk) - 1 - 2 * kept :]]
            fits = len(render_prompt(tokenizer, shorter, spec))
            for limit in (fits, fits + 5):
                assert fit_prompt(tokenizer, talk, spec, limit) == render_prompt(tokenizer, shorter, spec)

    def test_then_the_last_question_loses_its_front(self) -> None:
        tokenizer, spec = world("headers, trimmed")
        talk = long_talk()
        least = render_prompt(tokenizer, [talk[0], talk[-1]], spec)
        ids = fit_prompt(tokenizer, talk, spec, len(least) - 6)
        text = tokenizer.decode(ids)
        assert len(least) - 9 <= len(ids) <= len(least) - 6
        assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>")
        assert text.endswith(" of all<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        assert "the last" not in text and text.count("<|start_header_id|>user") == 1

    def test_a_system_turn_that_leaves_no_room_goes_before_the_question(self) -> None:
        tokenizer, spec = world("headers, trimmed")
        talk = long_talk(system="rules " * 200)
        alone = render_prompt(tokenizer, [talk[-1]], spec)
        assert fit_prompt(tokenizer, talk, spec, len(alone)) == alone

    def test_turns_still_alternate_where_the_template_asks_for_it(self) -> None:
        tokenizer, spec = alternating()
        talk = long_talk()
        whole = render_prompt(tokenizer, talk, spec)
        for limit in range(len(whole) - 1, 30, -7):
            ids = fit_prompt(tokenizer, talk, spec, limit)
            text = tokenizer.decode(ids)
            assert len(ids) <= limit and text.startswith("<s>[INST]") and "Be kind." in text
            assert text.endswith(" all[/INST]")

    @pytest.mark.parametrize("limit", [1, 2, 3, 4])
    def test_less_room_than_the_template_needs_leaves_the_place_where_an_answer_begins(self, limit: int) -> None:
        tokenizer, spec = world("headers, trimmed")
        whole = render_prompt(tokenizer, long_talk(), spec)
        ids = fit_prompt(tokenizer, long_talk(), spec, limit)
        assert ids == (whole[-1:] if limit == 1 else [tokenizer.bos_token_id, *whole[1 - limit :]])

    def test_a_long_conversation_is_not_rendered_once_for_every_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer, spec = world("byte-level")
        talk = long_talk(200)
        whole = render_prompt(tokenizer, talk, spec)
        calls = []

        def counting(*arguments: Any, **options: Any) -> list[int]:
            calls.append(arguments)
            return render_prompt(*arguments, **options)

        monkeypatch.setattr(truncation, "render_prompt", counting)
        assert fit_prompt(tokenizer, talk, spec, len(whole), whole) == whole and not calls, "what fits costs nothing"
        fit_prompt(tokenizer, talk, spec, len(whole) // 3, whole)
        assert len(calls) <= 9

    def test_a_prefill_stays(self) -> None:
        tokenizer, spec = world("byte-level")
        talk = [*long_talk(), turn("assistant", "Sure, here")]
        ids = fit_prompt(tokenizer, talk, spec, len(render_prompt(tokenizer, talk, spec)) - 1)
        assert tokenizer.decode(ids).endswith("<|assistant|>Sure, here") and "question 0" not in tokenizer.decode(ids)


class TestRows:
    ROW = Row([*long_talk(), turn("assistant", "Sure thing, it is so.")], category="harm", onset=5, id="one")

    @pytest.mark.parametrize("name", ["byte-level", "headers, trimmed"])
    @pytest.mark.parametrize("max_length", [2, 3, 20, 60, 100, None])
    def test_training_and_scoring_see_the_same_ids(self, name: str, max_length: int | None) -> None:
        tokenizer, spec = world(name)
        spec = FlagSpec(spec.flags[:1])
        row, example = fit(tokenizer, spec, self.ROW, 0, max_length), encode(self.ROW, tokenizer, spec, max_length)
        assert example["input_ids"] == row.prompt_ids + row.response_ids + row.tail_ids
        assert example["response_start"] == len(row.prompt_ids) and example["onset"] == row.onset
        assert example.get("prompt_truncated", False) == row.prompt_truncated == (max_length is not None)
        assert row.truncated == (max_length in (2, 3))

    def test_a_prompt_that_is_cut_begins_with_bos(self) -> None:
        tokenizer, spec = world("headers, trimmed")
        ids = encode(self.ROW, tokenizer, FlagSpec(spec.flags[:1]), 60)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id

    def test_rows_that_were_cut_are_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        tokenizer, spec = world("byte-level")
        spec = FlagSpec(spec.flags[:1])
        short = Row([turn("user", "Hi"), turn("assistant", "Yes")], id="two")
        assert "prompt_truncated" not in build_dataset([self.ROW, short], tokenizer, spec, 60).column_names
        assert capsys.readouterr().out == (
            "1 of 2 prompts did not fit into max_length 60 and lost their oldest turns\n"
        )
        build_dataset([short], tokenizer, spec, 60)
        assert not capsys.readouterr().out

    def test_a_response_too_long_leaves_one_token_of_the_prompt(self) -> None:
        tokenizer, spec = world("byte-level")
        row = fit_row(tokenizer, [turn("user", "Hi"), turn("assistant", "a " * 50)], spec, 10)
        assert len(row.prompt_ids) == 1 and len(row.response_ids) == 9 and row.tail_ids == []
        assert row.prompt_truncated and row.response_truncated


def test_a_template_that_refuses_a_shorter_conversation_is_cut_in_its_ids() -> None:
    tokenizer = with_template(
        "{% if messages|length < 4 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    spec = FlagSpec((Flag("harm", "<|reserved_0|>", id=tokenizer.convert_tokens_to_ids("<|reserved_0|>")),))
    talk = long_talk(1, system="Be kind.")
    whole = render_prompt(tokenizer, talk, spec)
    assert fit_prompt(tokenizer, talk, spec, 12) == whole[-12:]
