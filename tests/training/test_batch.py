"""Counts and judged positions of a batch are those of a plain loop over its tokens, and counts survive their tensor."""

from __future__ import annotations

import pytest
import torch
from terms import row, world

from redflag.training.batch import Counts, JudgedPositions
from redflag.training.encode import IGNORE, Collator, PlacementConfig


def batch_of(tokenizer, answers, forecasts, placement="insert"):
    soft = {"forecast": [[0, 0.25]], "forecast_category": "harm"}
    rows = [
        row("tell", "the cat sat on the mat", "harm", onset=8, id="a", group="one", **soft),
        row("tell", "the dog sat", id="b", group="one", **soft),
        row("tell", "the cat sat on the mat", id="c", prefill=8, **soft),
        row("tell", "the mat", id="d", **soft),
    ]
    _, spec, data = world(tokenizer, rows)
    config = PlacementConfig(placement, forecasts=forecasts)
    return Collator(config, spec, 0, 5, answers=answers)(list(data))


def loop(batch):
    """The same numbers, token by token."""
    found = dict.fromkeys(Counts._fields, 0)
    size = batch["labels"].shape
    for r in range(size[0]):
        kinds, past = set(), False
        harmful, prefill = bool(batch["flag_class"][r] > 0), int(batch["prefill"][r])
        found["answered"] += max(prefill, 0)
        for t in range(size[1]):
            spoken = bool(batch["labels"][r, t] != IGNORE)
            inserted, answered = bool(batch["inserted"][r, t]), bool(batch["answered"][r, t])
            pinned, label = spoken and not answered, int(batch["flag_labels"][r, t])
            found["answered"] += answered or (prefill >= 0 and spoken and not inserted)
            if t:
                found["pinned"] += pinned
                found["benign"] += pinned and not harmful
                found["after"] += pinned and harmful and past
                found["flagged"] += label > 0
                found["harmless"] += label == 0
                found["forecast"] += max(float(batch["forecast"][r, t]), 0) if "forecast" in batch else 0
                kinds |= {"responses_flagged"} if label > 0 else {"responses_harmless"} if label == 0 else set()
            past = past or inserted
        for kind in kinds:
            found[kind] += 1
    return found


@pytest.mark.parametrize(
    ("placement", "forecasts"), [("dense", "off"), ("dense", "hold"), ("insert", "off"), ("first", "off")]
)
@pytest.mark.parametrize("answers", [None, "marked", "harmless", "all"])
def test_counts_are_those_of_a_loop_over_the_tokens(tokenizer, answers, forecasts, placement):
    batch = batch_of(tokenizer, answers, forecasts, placement)
    expected = loop(batch)
    counts = Counts.of(batch, "first")
    assert int(counts.groups) == 1 and int(Counts.of(batch, "peak").groups) == 0
    assert (counts.forecast is None) == (forecasts == "off")
    for name, number in counts._asdict().items():
        if name != "groups" and number is not None:
            assert number.item() == pytest.approx(expected[name]), name


def test_counts_survive_their_tensor_and_add_up_by_name(tokenizer):
    for forecasts, dtype, size in (("off", torch.int64, 9), ("hold", torch.float32, 10)):
        counts = Counts.of(batch_of(tokenizer, "all", forecasts, "dense"), "first")
        numbers = counts.to_tensor()
        assert numbers.dtype == dtype and numbers.shape == (size,)
        twice = Counts.from_tensor(numbers + numbers)
        for name, number in counts._asdict().items():
            again = getattr(twice, name)
            assert again is None if number is None else again.item() == 2 * number.item(), name


def test_judged_positions_have_a_label_and_a_column_before_them(tokenizer):
    batch = batch_of(tokenizer, None, "off")
    batch["labels"][0, 0] = batch["flag_labels"][0, 0] = 1  # no hidden state judges it
    expected = [
        (r, t)
        for r in range(batch["labels"].shape[0])
        for t in range(1, batch["labels"].shape[1])
        if batch["labels"][r, t] != IGNORE or batch["flag_labels"][r, t] != IGNORE
    ]
    judged = JudgedPositions.of(batch)
    assert list(zip(judged.row.tolist(), judged.column.tolist(), strict=True)) == expected
    assert judged.labels.tolist() == [int(batch["labels"][place]) for place in expected]
    assert judged.flag_labels.tolist() == [int(batch["flag_labels"][place]) for place in expected]
