from __future__ import annotations

import numpy as np

from redflag.scoring.earlier import score_earlier


class Echo:
    """Gives each token's id as its probability; remembers how many rows it got at a time."""

    def __init__(self):
        self.sizes = []

    def score(self, pairs, *, batch_size):
        self.sizes.append(len(pairs))
        return [np.array(response, np.float32) for _, response in pairs]


def test_earlier_answers_are_measured_a_few_batches_at_a_time_and_keep_their_order():
    histories = [(list(range(i, i + 9)), ((2, 4), (6, 9)) if i % 3 else ()) for i in range(60)]
    scorer = Echo()
    answers = score_earlier(scorer, histories, batch_size=2)
    assert scorer.sizes == [16, 16, 8]
    assert [[part.tolist() for part in parts] for parts in answers] == [
        [[i + 2, i + 3], [i + 6, i + 7, i + 8]] if i % 3 else [] for i in range(60)
    ]
