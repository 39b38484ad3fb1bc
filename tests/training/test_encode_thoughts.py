"""Rows with thoughts as the trainer sees them."""

from __future__ import annotations

import pytest
from templates import turn
from test_real_tokenizers import world
from thinking import ASK

from redflag.data.rows import Row, load_rows
from redflag.errors import RedflagError
from redflag.training.encode import IGNORE, Collator, PlacementConfig, build_dataset, encode, place

X = IGNORE
THOUGHT, ANSWER = "One two three", "Yes bad"


def row(category=None, onset=None, thought_onset=None, thought=THOUGHT, **more):
    answer = turn("assistant", ANSWER) | ({"reasoning_content": thought} if thought else {})
    return Row([*ASK, answer], category, onset, thought_onset=thought_onset, **more)


def labels(given, placement="dense", **options):
    """Classes of the thought's positions (One, two, three, line break, mark) and of the answer's, and pinned ids."""
    tokenizer, spec = world("qwen3")
    example = encode(given, tokenizer, spec)
    placed = place(example, PlacementConfig(placement, **options), spec)
    start, border = example["response_start"], example["response_start"] + example.get("thought", 0)
    assert placed.labels[:start] == [X] * start
    return placed.flag_labels[start:border], placed.flag_labels[border:], placed


@pytest.mark.parametrize(
    "given, thought, answer",
    [
        (row(), [0] * 5, [0] * 4),
        (row("harm"), [X] * 5, [1] * 4),  # harmful from its answer on; nobody says what the thought is
        (row("harm", 4), [X] * 5, [0, 0, 1, 1]),  # white space, Yes, bad, end of turn
        (row("fraud", 4, 4), [0, 2, 2, 2, 2], [0, 0, 2, 2]),  # somebody says where it begins to be harmful
        (row("harm", 0, 0), [1] * 5, [0, 1, 1, 1]),
        (row("harm", 4, thought=None), [], [0, 1, 1]),
    ],
)
def test_dense_labels(given, thought, answer):
    assert labels(given)[:2] == (thought, answer)


@pytest.mark.parametrize(
    "placement, category, thought, answer",
    [
        ("first", None, [X] * 5, [0, X, X, X]),
        ("first", "harm", [X] * 5, [1, X, X, X]),
        ("open", None, [X] * 5, [0, X, X, X]),
        ("open", "harm", [X] * 5, [1, X, X, X, X]),  # and the flag stands in the text, where the answer begins
        ("insert", None, [0] * 5, [0] * 4),
    ],
)
def test_flags_of_other_placements_stand_in_the_answer(placement, category, thought, answer):
    found, behind, placed = labels(row(category), placement)
    assert (found, behind) == (thought, answer)
    if placement == "open" and category:
        assert placed.inserted.index(True) == len(placed.inserted) - 5


@pytest.mark.parametrize("placement", ["insert", "until"])
def test_a_flag_is_never_put_into_a_thought(placement):
    tokenizer, spec = world("qwen3")
    example = encode(row("harm", 4, 0), tokenizer, spec)
    border = example["response_start"] + example["thought"]
    for epoch in range(20):
        placed = place(example, PlacementConfig(placement), spec, epoch=epoch)
        assert placed.inserted.index(True) >= border + 2
        assert placed.flag_labels[border - 5 : border] == [X] * 5


def test_language_is_pinned_in_the_thought_too():
    tokenizer, spec = world("qwen3")
    example = encode(row(), tokenizer, spec)
    placed = place(example, PlacementConfig(), spec)
    pinned = [i for i in placed.labels if i != X]
    assert tokenizer.decode(pinned) == "One two three\n</think>\n\nYes bad<|im_end|>"


def test_rows_with_and_without_thoughts_make_one_data_set_and_one_batch():
    tokenizer, spec = world("qwen3")
    rows = [row(), row("harm", 4, 4), row("harm", 4, thought=None), row("harm", id="plain")]
    dataset = build_dataset(rows, tokenizer, spec)
    assert dataset["thought"] == [5, 5, 0, 5] and dataset["thought_onset"] == [-1, 1, -1, -1]
    batch = Collator(PlacementConfig(), spec, tokenizer.pad_token_id, 0)([dict(example) for example in dataset])
    assert (batch["flag_labels"] > 0).sum(dim=1).tolist() == [0, 6, 2, 4]
    assert "thought" not in build_dataset([row(thought=None)], tokenizer, spec).column_names


def test_a_row_learnt_without_its_flag_has_a_harmless_thought():
    tokenizer, spec = world("qwen3")
    (example,) = build_dataset([row("harm", 4, 0)], tokenizer, spec, plain_share=1.0)
    assert set(place(example, PlacementConfig(), spec).flag_labels) == {X, 0}


def test_a_thought_that_does_not_fit_leaves_no_answer_to_label():
    tokenizer, spec = world("qwen3")
    for placement in ("dense", "first", "open", "insert"):
        example = encode(row("harm", 4, 0), tokenizer, spec, 4)
        placed = place(example, PlacementConfig(placement), spec)
        assert example["thought"] == 3 and len(placed.flag_labels) == len(placed.input_ids) == 4


def test_a_prefill_and_a_thought_do_not_go_together():
    with pytest.raises(RedflagError, match="a prefill and a thought"):
        encode(row(prefill=2), *world("qwen3"))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"thought_onset": 3}, "in a row without category"),
        ({"thought_onset": 13, "category": "harm"}, "within the thought of 13 characters"),
        ({"thought_onset": True, "category": "harm"}, "must be a whole number"),
        ({"thought_onset": 0, "category": "harm", "messages": row(thought=None).messages}, "thought of 0 characters"),
    ],
)
def test_an_onset_of_a_thought_that_cannot_be_is_named(change, reason):
    with pytest.raises(RedflagError, match=reason):
        load_rows([{"messages": row().messages, **change}])
    (read,) = load_rows([{"messages": row().messages, "category": "harm", "thought_onset": 12}])
    assert read.thought_onset == 12 and read.to_dict()["thought_onset"] == 12
