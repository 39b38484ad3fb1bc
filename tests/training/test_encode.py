"""Which ids a row becomes, and which class every position gets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import render_response
from redflag.training.encode import (
    IGNORE,
    Collator,
    Example,
    Placed,
    PlacementConfig,
    build_dataset,
    encode,
    onset_token,
    place,
)

ONE = FlagSpec((Flag("harm", "<f>", id=90),))
TWO = FlagSpec((Flag("weapons", "<f>", id=90), Flag("fraud", "<g>", id=91)))


@functools.cache
def world() -> tuple[Any, FlagSpec]:
    tokenizer = train_tokenizer(["The quick brown fox bakes bread."] * 3, 320)
    ids = [tokenizer.convert_tokens_to_ids(f"<|reserved_{i}|>") for i in range(2)]
    return tokenizer, FlagSpec(
        (Flag("weapons", "<|reserved_0|>", id=ids[0]), Flag("fraud", "<|reserved_1|>", id=ids[1]))
    )


def row(response: str, category: str | None = None, onset: int | None = None, prompt: str = "Hi") -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return Row(messages=messages, category=category, onset=onset)


def example(onset: int = 0, flag_class: int = 0, row: int = 0) -> Example:
    """Two prompt tokens, then four response tokens."""
    return Example(row=row, input_ids=[1, 2, 11, 12, 13, 14], response_start=2, onset=onset, flag_class=flag_class)


X = IGNORE


class TestPlaceWithoutInsertion:
    """Labels of the four response positions; prompt positions are ignored in every case."""

    @pytest.mark.parametrize(
        "placement, onset, flag_class, soft_margin, expected",
        [
            ("first", 0, 0, 0, [0, X, X, X]),
            ("first", 0, 1, 0, [1, X, X, X]),
            ("first", 2, 1, 1, [1, X, X, X]),
            ("first", 2, 2, 0, [2, X, X, X]),
            ("first", 9, 1, 0, [1, X, X, X]),
            ("dense", 0, 0, 0, [0, 0, 0, 0]),
            ("dense", 0, 0, 3, [0, 0, 0, 0]),
            ("dense", 0, 1, 0, [1, 1, 1, 1]),
            ("dense", 0, 2, 0, [2, 2, 2, 2]),
            ("dense", 2, 1, 0, [0, 0, 1, 1]),
            ("dense", 2, 2, 0, [0, 0, 2, 2]),
            ("dense", 3, 1, 0, [0, 0, 0, 1]),
            ("dense", 4, 1, 0, [0, 0, 0, 0]),
            ("dense", 9, 1, 0, [0, 0, 0, 0]),
            ("dense", 2, 1, 1, [0, X, 1, 1]),
            ("dense", 2, 1, 2, [X, X, 1, 1]),
            ("dense", 2, 1, 9, [X, X, 1, 1]),
            ("dense", 0, 1, 9, [1, 1, 1, 1]),
            ("dense", 4, 1, 1, [0, 0, 0, X]),  # cut off, and the margin reaches into what is left
            ("dense", 5, 1, 3, [0, 0, X, X]),
            ("dense", 9, 1, 2, [0, 0, 0, 0]),
            ("insert", 0, 0, 0, [0, 0, 0, 0]),
            ("insert", 4, 1, 0, [0, 0, 0, 0]),
            ("insert", 5, 2, 2, [0, 0, 0, X]),
        ],
    )
    def test_table(self, placement: Any, onset: int, flag_class: int, soft_margin: int, expected: list[int]) -> None:
        placed = place(example(onset, flag_class), PlacementConfig(placement, soft_margin=soft_margin), TWO)
        assert placed == Placed(
            input_ids=[1, 2, 11, 12, 13, 14],
            labels=[X, X, 11, 12, 13, 14],
            flag_labels=[X, X, *expected],
            inserted=[False] * 6,
        )

    @pytest.mark.parametrize("placement", ["first", "dense", "insert"])
    def test_a_response_of_one_token(self, placement: Any) -> None:
        one = Example(row=0, input_ids=[1, 11], response_start=1, onset=0, flag_class=1)
        placed = place(one, PlacementConfig(placement), ONE)
        expected = {"first": [X, 1], "dense": [X, 1], "insert": [X, 1, X]}[placement]
        assert placed.flag_labels == expected

    def test_the_example_is_left_as_it_is(self) -> None:
        before = example(1, 1)
        for placement in ("first", "insert", "dense"):
            place(before, PlacementConfig(placement), ONE)  # type: ignore[arg-type]
        assert before == example(1, 1)


class TestInsert:
    @pytest.mark.parametrize(
        "onset, flag_class, config, ids, labels, flag_labels",
        [
            # Only one position can be drawn, so the whole result is known.
            (3, 1, {}, [1, 2, 11, 12, 13, 90, 14], [X, X, 11, 12, 13, 90, 14], [X, X, 0, 0, 0, 1, X]),
            (3, 2, {}, [1, 2, 11, 12, 13, 91, 14], [X, X, 11, 12, 13, 91, 14], [X, X, 0, 0, 0, 2, X]),
            (
                0,
                1,
                {"minimum_offset": 3},
                [1, 2, 11, 12, 13, 90, 14],
                [X, X, 11, 12, 13, 90, 14],
                [X, X, X, X, X, 1, X],
            ),
            (
                1,
                1,
                {"minimum_offset": 99},
                [1, 2, 11, 12, 13, 90, 14],
                [X, X, 11, 12, 13, 90, 14],
                [X, X, 0, X, X, 1, X],
            ),
            (
                3,
                1,
                {"soft_margin": 2, "insertions": 5},
                [1, 2, 11, 12, 13, 90, 14],
                [X, X, 11, 12, 13, 90, 14],
                [X, X, 0, X, X, 1, X],
            ),
            (
                2,
                2,
                {"insertions": 2},
                [1, 2, 11, 12, 91, 13, 91, 14],
                [X, X, 11, 12, 91, 13, 91, 14],
                [X, X, 0, 0, 2, X, 2, X],
            ),
            (
                0,
                1,
                {"insertions": 9},
                [1, 2, 90, 11, 90, 12, 90, 13, 90, 14],
                [X, X, 90, 11, 90, 12, 90, 13, 90, 14],
                [X, X, 1, X, 1, X, 1, X, 1, X],
            ),
        ],
    )
    def test_table(
        self,
        onset: int,
        flag_class: int,
        config: dict[str, int],
        ids: list[int],
        labels: list[int],
        flag_labels: list[int],
    ) -> None:
        placed = place(example(onset, flag_class), PlacementConfig("insert", **config), TWO)  # type: ignore[arg-type]
        assert placed == Placed(ids, labels, flag_labels, [i in (90, 91) for i in ids])

    @given(
        length=st.integers(1, 20),
        start=st.integers(1, 5),
        onset=st.integers(0, 24),
        flag_class=st.integers(0, 2),
        minimum_offset=st.integers(0, 24),
        insertions=st.integers(1, 5),
        soft_margin=st.integers(0, 6),
        seed=st.integers(0, 9),
        epoch=st.integers(0, 9),
        placement=st.sampled_from(["first", "insert", "dense"]),
    )
    def test_what_is_drawn_is_allowed_and_can_be_taken_out_again(
        self,
        length: int,
        start: int,
        onset: int,
        flag_class: int,
        minimum_offset: int,
        insertions: int,
        soft_margin: int,
        seed: int,
        epoch: int,
        placement: Any,
    ) -> None:
        ids = list(range(100, 100 + start + length))
        given_row = Example(row=3, input_ids=ids, response_start=start, onset=onset, flag_class=flag_class)
        config = PlacementConfig(placement, minimum_offset, insertions, soft_margin)
        placed = place(given_row, config, TWO, seed, epoch)
        assert placed == place(given_row, config, TWO, seed, epoch)
        assert len({len(column) for column in placed[:4]}) == 1 and placed.forecast is None
        flags = set(TWO.ids)
        assert placed.inserted == [i in flags for i in placed.input_ids]
        kept = [i for i, inserted in enumerate(placed.inserted) if not inserted]
        assert [placed.input_ids[i] for i in kept] == ids
        assert [placed.labels[i] for i in kept] == [IGNORE] * start + ids[start:]
        drawn = [i for i, inserted in enumerate(placed.inserted) if inserted]
        harmful_left = placement == "insert" and flag_class > 0 and onset < length
        assert len(drawn) == (
            min(insertions, length - max(onset, min(minimum_offset, length - 1))) if harmful_left else 0
        )
        for number, position in enumerate(drawn):
            original = position - number - start  # of the token that it stands before
            assert max(onset, min(minimum_offset, length - 1)) <= original < length
            assert placed.input_ids[position] == placed.labels[position] == TWO.ids[flag_class - 1]
            assert placed.flag_labels[position] == flag_class
        labels = [placed.flag_labels[i] for i in kept]
        assert labels[:start] == [IGNORE] * start
        if placement != "first":
            before = min(onset, length) if flag_class else length
            assert labels[start : start + before] == [
                IGNORE if flag_class and i >= onset - soft_margin else 0 for i in range(before)
            ]
            assert set(labels[start + before :]) <= {flag_class if placement == "dense" else IGNORE}

    def test_draws_differ_between_epochs_rows_and_seeds_and_cover_all_positions(self) -> None:
        config = PlacementConfig("insert")

        def drawn(row: int, seed: int, epoch: int) -> int:
            long = Example(row=row, input_ids=list(range(40)), response_start=4, onset=6, flag_class=1)
            return place(long, config, ONE, seed, epoch).inserted.index(True)

        assert {drawn(0, 0, epoch) for epoch in range(400)} == set(range(10, 40))
        for vary in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            assert len({drawn(*(i * v for v in vary)) for i in range(20)}) > 5

    def test_a_draw_is_the_same_on_every_machine(self) -> None:
        config = PlacementConfig("insert")
        long = Example(row=2, input_ids=list(range(100)), response_start=0, onset=0, flag_class=1)
        assert [place(long, config, ONE, seed=1, epoch=e).inserted.index(True) for e in range(5)] == [
            49,
            79,
            44,
            22,
            59,
        ]


class TestInContext:
    """A flag that stands in the response and is read past."""

    @pytest.mark.parametrize("placement", ["first", "dense"])
    @pytest.mark.parametrize("onset, flag_class", [(0, 0), (0, 1), (2, 2), (9, 1)])
    def test_without_the_flag_every_label_is_what_it_would_be(
        self, placement: Any, onset: int, flag_class: int
    ) -> None:
        plain = place(example(onset, flag_class), PlacementConfig(placement, soft_margin=1), TWO)
        seen = set()
        for epoch in range(60):
            config = PlacementConfig(placement, soft_margin=1, in_context=1.0)
            placed = place(example(onset, flag_class), config, TWO, epoch=epoch)
            position = placed.inserted.index(True)
            seen.add((position, placed.input_ids[position]))
            assert placed.labels[position] == placed.input_ids[position]
            # The moment before the flag is the moment before the token that stands behind it.
            assert placed.flag_labels[position] == plain.flag_labels[position]
            for column in placed[:4]:
                del column[position]  # type: ignore[attr-defined]
            assert placed == plain
        # Harmless rows as well, any flag, anywhere in the response: a flag that is there says nothing.
        assert seen == {(position, flag) for position in range(2, 6) for flag in TWO.ids}

    def test_the_share_is_that_of_the_rows(self) -> None:
        config = PlacementConfig("dense", in_context=0.25)
        rows = [place(example(1, row % 2, row), config, ONE) for row in range(2000)]
        assert 420 < sum(any(placed.inserted) for placed in rows) < 580

    def test_insert_has_its_flags_in_the_text_already(self) -> None:
        placed = place(example(3, 1), PlacementConfig("insert", in_context=1.0), ONE)
        assert placed == place(example(3, 1), PlacementConfig("insert"), ONE)


class TestConfig:
    @pytest.mark.parametrize(
        "arguments, words",
        [
            ({"in_context": 1.5}, "in_context is 1.5"),
            ({"placement": "last"}, "placement 'last' is none of first, open, insert, until, dense"),
            ({"minimum_offset": -1}, "minimum_offset is -1"),
            ({"insertions": 0}, "insertions is 0"),
            ({"soft_margin": -3}, "soft_margin is -3"),
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
        with pytest.raises(RedflagError, match="no flag stands for the category 'theft'"):
            encode(row("Sure", "theft"), *world())

    @pytest.mark.parametrize("max_length", [0, 1, -5])
    def test_a_length_without_room_is_refused(self, max_length: int) -> None:
        with pytest.raises(RedflagError, match=f"max_length is {max_length}"):
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
        for bad, name in ((named, "row q17: no flag stands for"), (row(""), "row 1: the response is empty")):
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
        }
        assert {name: value.tolist() for name, value in batch.items()} == expected
        assert batch["inserted"].dtype == torch.bool
        assert {value.dtype for name, value in batch.items() if name != "inserted"} == {torch.int64}

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
