"""Which ids a row becomes, and which class every position gets."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from encoding import ONE, X, example, row, world
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.prompt import render_response
from redflag.training.encode import (
    IGNORE,
    Collator,
    Example,
    PlacementConfig,
    build_dataset,
    encode,
    onset_token,
    place,
)


class TestConfig:
    @pytest.mark.parametrize(
        "arguments, words",
        [
            ({"in_context": 1.5}, "in_context must be at least 0 and at most 1"),
            ({"placement": "last"}, "placement must be one of first, open, insert, until, dense"),
            ({"minimum_offset": -1}, "minimum_offset must be at least 0"),
            ({"insertions": 0}, "insertions must be at least 1"),
            ({"soft_margin": -3}, "soft_margin must be at least 0"),
        ],
    )
    def test_a_wrong_setting_is_named(self, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(RedflagError, match=words):
            PlacementConfig(**arguments)


class TestEncode:
    def test_prompt_response_and_end(self) -> None:
        tokenizer, spec = world()
        result = encode(row("Sure thing", "fraud", 5), tokenizer, spec, index=7)
        ids, start = result["input_ids"], result["response_start"]
        assert tokenizer.decode(ids[:start]) == "<|user|>Hi<|end|><|assistant|>"
        assert tokenizer.decode(ids[start:]) == "Sure thing<|end|>"
        assert (result["row"], result["flag_class"]) == (7, 2)
        assert tokenizer.decode(ids[start + result["onset"] :]).lstrip() == "thing<|end|>"

    @pytest.mark.parametrize("onset", [None, 0])
    def test_a_harmful_row_without_onset_is_harmful_from_the_start(self, onset: int | None) -> None:
        assert encode(row("Sure", "weapons", onset), *world())["onset"] == 0

    def test_a_harmless_row_has_class_and_onset_zero(self) -> None:
        result = encode(row("Sure"), *world())
        assert (result["flag_class"], result["onset"]) == (0, 0)

    def test_an_unknown_category_is_refused(self) -> None:
        with pytest.raises(RedflagError, match=r"the category of a row must be one of the flags', .* \(got 'theft'\)"):
            encode(row("Sure", "theft"), *world())

    @pytest.mark.parametrize("max_length", [0, 1, -5])
    def test_a_length_without_room_is_refused(self, max_length: int) -> None:
        with pytest.raises(RedflagError, match=rf"max_length must be at least 2 \(got {max_length}\)"):
            encode(row("Sure"), *world(), max_length=max_length)

    @given(
        prompt=st.text("ab ", min_size=1, max_size=40), response=st.text("ab ", min_size=1, max_size=40), data=st.data()
    )
    @settings(max_examples=50)
    def test_truncation_cuts_the_front_of_what_was_asked_and_only_then_the_response(
        self, prompt: str, response: str, data: Any
    ) -> None:
        tokenizer, spec = world()
        prompt += "a"
        full = encode(row(response, "weapons", len(response) - 1, prompt), tokenizer, spec)
        max_length = data.draw(st.integers(2, len(full["input_ids"]) + 3))
        cut = encode(row(response, "weapons", len(response) - 1, prompt), tokenizer, spec, max_length)
        whole_prompt, whole = full["input_ids"][: full["response_start"]], full["input_ids"][full["response_start"] :]
        kept_prompt, kept = cut["input_ids"][: cut["response_start"]], cut["input_ids"][cut["response_start"] :]
        assert len(cut["input_ids"]) <= max_length
        assert kept == whole[: max_length - 1]
        # The head of the turn stays where there is room for anything in it: two marks around one token at least.
        head = whole_prompt[:1] if len(kept_prompt) > 2 and kept_prompt[0] == whole_prompt[0] else []
        rest = kept_prompt[len(head) :]
        assert kept_prompt and whole_prompt[len(whole_prompt) - len(rest) :] == rest
        assert ("prompt_truncated" in cut) == (len(kept_prompt) < len(whole_prompt))
        assert cut["onset"] == full["onset"]

    def test_an_onset_that_is_cut_off_leaves_a_harmless_beginning(self) -> None:
        tokenizer, spec = world()
        cut = encode(row("a b c d e f g h", "weapons", 14), tokenizer, spec, max_length=6)
        placed = place(cut, PlacementConfig("dense"), spec)
        assert len(placed.input_ids) == 6 and set(placed.flag_labels) == {IGNORE, 0}

    def test_flag_text_in_a_response_is_never_a_flag(self) -> None:
        tokenizer, spec = world()
        result = encode(row("<|reserved_0|><|end|>", "weapons", 3, "<|reserved_1|>"), tokenizer, spec)
        assert not set(spec.ids) & set(result["input_ids"])
        assert result["input_ids"][result["response_start"] :].count(tokenizer.eos_token_id) == 1
        placed = place(result, PlacementConfig("insert"), spec)
        assert placed.input_ids.count(spec.ids[0]) == 1


class TestBuildDataset:
    def test_rows_are_numbered_in_order(self) -> None:
        rows = [row("Sure"), row("Sure thing", "fraud", 5)]
        data = build_dataset(rows, *world())
        assert [dict(item) for item in data] == [encode(r, *world(), index=i) for i, r in enumerate(rows)]

    def test_a_row_that_cannot_be_encoded_is_named(self) -> None:
        named = dataclasses.replace(row("Sure", "theft"), id="q17")
        for bad, name in (
            (named, "row q17: the category of a row must be one of the flags"),
            (row(""), "row 1: the response must not be empty"),
        ):
            with pytest.raises(RedflagError, match=name):
                build_dataset([row("Sure"), bad], *world())


class TestOnset:
    @pytest.mark.parametrize(
        "offsets, onset, expected",
        [
            ([(0, 4), (4, 9), (9, 10)], None, 0),
            ([(0, 4), (4, 9), (9, 10)], 0, 0),
            ([(0, 4), (4, 9), (9, 10)], 3, 0),
            ([(0, 4), (4, 9), (9, 10)], 4, 1),
            ([(0, 4), (4, 9), (9, 10)], 8, 1),
            ([(0, 4), (4, 9), (9, 10)], 9, 2),
            ([(0, 4), (4, 9), (9, 10)], 10, 3),  # past the end: the end of turn
            ([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], 1, 1),  # one character in three tokens: its first
            ([(0, 1), (2, 3)], 1, 1),  # white space that no token holds
            ([], 0, 0),
        ],
    )
    def test_table(self, offsets: list[tuple[int, int]], onset: int | None, expected: int) -> None:
        assert onset_token(offsets, onset) == expected

    @given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), data=st.data())
    def test_the_token_holds_the_character_and_all_before_it_end_earlier(self, text: str, data: Any) -> None:
        tokenizer, spec = world()
        onset = data.draw(st.integers(0, len(text) - 1))
        rendered = render_response(tokenizer, row(text).messages, spec)
        token = onset_token(rendered.offsets, onset)
        low, high = rendered.offsets[token]
        assert low <= onset < high
        assert all(end <= onset for _, end in rendered.offsets[:token])
        before = tokenizer.decode(rendered.response_ids[:token])
        assert text.startswith(before) and len(before) <= onset


class TestCollator:
    def test_rows_are_padded_on_the_right(self) -> None:
        rows = [example(2, 1), Example(row=1, input_ids=[1, 11, 12], response_start=1, onset=0, flag_class=0)]
        batch = Collator(PlacementConfig("dense"), ONE, pad_id=5, seed=0)(rows)
        expected = {
            "input_ids": [[1, 2, 11, 12, 13, 14], [1, 11, 12, 5, 5, 5]],
            "attention_mask": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]],
            "labels": [[X, X, 11, 12, 13, 14], [X, 11, 12, X, X, X]],
            "flag_labels": [[X, X, 0, 0, 1, 1], [X, 0, 0, X, X, X]],
            "inserted": [[False] * 6, [False] * 6],
            "flag_class": [1, 0],
            "group": [-1, -1],
            "prefill": [-1, -1],
            "response_start": [2, 1],
            "answered": [[False] * 6, [False] * 6],
        }
        assert {name: value.tolist() for name, value in batch.items()} == expected
        assert batch["inserted"].dtype == batch["answered"].dtype == torch.bool
        assert {value.dtype for name, value in batch.items() if name not in ("inserted", "answered")} == {torch.int64}

    def test_the_batch_is_as_wide_as_its_widest_row_with_flags(self) -> None:
        rows = [example(3, 1), example(0, 0, row=1)]
        batch = Collator(PlacementConfig("insert"), ONE, pad_id=0, seed=0)(rows)
        assert batch["input_ids"].tolist() == [[1, 2, 11, 12, 13, 90, 14], [1, 2, 11, 12, 13, 14, 0]]
        assert batch["inserted"].tolist() == [[False] * 5 + [True, False], [False] * 7]

    def test_the_epoch_moves_the_flags_and_the_seed_repeats_them(self) -> None:
        rows = [Example(row=i, input_ids=list(range(1, 60)), response_start=2, onset=0, flag_class=1) for i in range(4)]

        def epochs(seed: int) -> list[Any]:
            collator = Collator(PlacementConfig("insert"), ONE, pad_id=0, seed=seed)
            batches = []
            for collator.epoch in range(3):
                batches.append(collator(rows)["input_ids"].tolist())
            return batches

        assert epochs(0) == epochs(0)
        assert all(a != b for a, b in itertools.combinations([*epochs(0), *epochs(1)], 2))
