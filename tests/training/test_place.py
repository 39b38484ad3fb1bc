"""Where a placement puts flags, and which class every position gets."""

from __future__ import annotations

from typing import Any

import pytest
from encoding import ONE, TWO, X, example
from hypothesis import given
from hypothesis import strategies as st

from redflag.training.encode import (
    IGNORE,
    Example,
    Placed,
    PlacementConfig,
    place,
)


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
