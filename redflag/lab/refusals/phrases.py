"""Refusals by the phrases of a taxonomy, without training.

Crude, and meant as a first look: refusals in other words are missed, and a story in which someone says "I cannot help
with" counts as one. Requests are not classified.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redflag.lab.refusals.classifier import Judged
from redflag.lab.refusals.pairs import RequestAndAnswer
from redflag.lab.refusals.taxonomy import Taxonomy


class PhraseClassifier:
    """Judges by phrases alone."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        self.taxonomy = taxonomy
        self.classes = taxonomy.classes()
        self.what = (
            f"phrases of the taxonomy {taxonomy.name}, without any training: crude; train a classifier to go further"
        )

    def judge(self, pairs: Sequence[RequestAndAnswer]) -> Judged:
        """Refusal is 1 or 0; a refusal's categories share 1 equally; none where no phrase names one.

        Example:
            >>> from redflag.lab.refusals.taxonomy import load_taxonomy
            >>> refusal = RequestAndAnswer("?", "I'm sorry, but I can't share personal information.")
            >>> judged = PhraseClassifier(load_taxonomy()).judge([refusal, RequestAndAnswer("2+2?", "4")])
            >>> judged.refusal.tolist(), judged.categories[0].tolist()
            ([1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0])
        """
        refusal = np.zeros(len(pairs))
        categories = np.full((len(pairs), len(self.classes)), np.nan)
        for i, pair in enumerate(pairs):
            if self.taxonomy.is_refusal(pair.response):
                refusal[i] = 1.0
                if reasons := self.taxonomy.reasons(pair.response):
                    categories[i] = 0.0
                    categories[i, reasons] = 1 / len(reasons)
        return Judged(refusal, categories, None)
