"""Means over batches and processes, and which rows of an evaluation's last batch are counted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from redflag.training.metric_means import Means, rows_that_count


def test_means_are_over_values_not_over_batches():
    means = Means()
    for batch in ([1.0, 2.0, 3.0], [10.0], []):
        means.add("loss", torch.tensor(batch))
    means.add("nothing", torch.tensor([]))
    # Another process that had one value of 4 and one of `nothing`.
    other = torch.tensor([[4.0, 1.0], [7.0, 1.0]], dtype=torch.float64)[None]
    accelerator = SimpleNamespace(gather=lambda mine: torch.cat([mine, other]))
    assert means.take(accelerator) == {"loss": 20 / 5, "nothing": 7.0}
    assert means.take(accelerator) == {}


def test_a_mean_of_nothing_is_nan():
    means = Means()
    means.add("loss", torch.tensor([]))
    assert math.isnan(means.take(SimpleNamespace(gather=lambda mine: mine))["loss"])


@pytest.mark.parametrize(
    ("last", "remainder", "process", "rows", "expected"),
    [
        (False, 5, 1, 8, 8),  # not the last batch
        (True, -1, 1, 8, 8),  # nothing was filled up
        (True, 5, 0, 5, 5),
        (True, 5, 0, 8, 5),
        (True, 5, 1, 8, 0),
        (True, 11, 0, 8, 8),
        (True, 11, 1, 8, 3),
    ],
)
def test_rows_that_fill_up_a_last_batch_do_not_count(last, remainder, process, rows, expected):
    state = SimpleNamespace(end_of_dataloader=last, remainder=remainder)
    accelerator = SimpleNamespace(gradient_state=state, process_index=process)
    assert rows_that_count(accelerator, rows, 8) == expected
