"""A bag of words: TF-IDF of the words and word pairs of the text so far, and a logistic regression."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence

import numpy as np

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.guard.detokenize import Detokenizer
from redflag.lab.baselines import Cost
from redflag.lab.baselines.shared import BaselineContext, Floats, Timing
from redflag.progress import track
from redflag.scoring.recording import Recording

_WORD = r"(?u)\b\w+\b"


class TfidfBaseline:
    """TF-IDF + logistic regression (scikit-learn) on the response so far, the prompt left out."""

    def __init__(self, context: BaselineContext, *, c: float = 3.0, beginnings: int = 2, min_df: int = 3) -> None:
        """`beginnings` random beginnings of each response are trained on besides the whole."""
        self.name = "tfidf"
        self.what = (
            "TF-IDF of words and word pairs of the response so far and logistic regression, trained on whole responses "
            f"and {beginnings} random beginnings of each, of the same rows as the flag."
        )
        self._context, self._c, self._beginnings, self._min_df = context, c, beginnings, min_df
        self._weights: dict[str, tuple[float, float]] = {}
        self._intercept = 0.0
        self._timing = Timing()

    def fit(self, train: Sequence[Row]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        draw = random.Random(self._context.seed)
        texts, labels = [], []
        for read in self._context.read(train):
            ids = read.judged_ids[: read.tokens]
            cuts = [len(ids), *(draw.randint(1, len(ids)) for _ in range(self._beginnings))]
            texts += self._context.tokenizer.batch_decode([ids[:cut] for cut in cuts], skip_special_tokens=True)
            labels += [read.row.harmful] * len(cuts)
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=min(self._min_df, len(train)), sublinear_tf=True, token_pattern=_WORD
        )
        model = LogisticRegression(C=self._c, class_weight="balanced", max_iter=300)
        try:
            model.fit(vectorizer.fit_transform(texts), labels)
        except ValueError as error:
            raise RedflagError(
                f"the rows of the baseline 'tfidf' must be of both classes, and enough that words recur (got "
                f"{len(train)} rows: {error})."
            ) from error
        names = vectorizer.get_feature_names_out()
        idf, weights = vectorizer.idf_.tolist(), model.coef_[0].tolist()
        self._weights = dict(zip(names.tolist(), zip(idf, weights, strict=True), strict=True))
        self._intercept = float(model.intercept_[0])

    def score(self, rows: Sequence[Row]) -> Recording:
        """Before the first token the probability is 0: there is no text to judge."""
        reads = self._context.read(rows)
        probs: list[Floats] = []
        for read in track(reads, f"scoring {self.name}", len(reads), "rows"):
            with self._timing.measuring(len(read.judged_ids)):
                logits = self.logits(map(Detokenizer(self._context.tokenizer).push, read.judged_ids[:-1]))
            probs.append(np.array([0.0, *(1 / (1 + math.exp(-z)) for z in logits)], dtype=np.float32))
        return self._context.record(reads, probs, self.name)

    def logits(self, pieces: Iterable[str]) -> list[float]:
        """The regression's decision after each piece of a text, brought up to date word by word.

        As scikit-learn computes it for the text so far; an unfinished word counts as a word.
        """
        bag = _Bag(self._weights)
        open_words, result = "", []
        for piece in pieces:
            open_words += piece.lower()
            words = list(re.finditer(_WORD, open_words))
            # All words but one that the text ends with are there to stay.
            stays = [m.group() for m in words if m.end() < len(open_words)]
            for word in stays:
                bag.add(word)
            open_words = words[-1].group() if len(stays) < len(words) else ""
            result.append(bag.decision(open_words or None) + self._intercept)
        return result

    def cost(self) -> Cost:
        return Cost(
            self._timing.microseconds_per_token,
            20.0,
            "on top of the model's forward pass; detokenisation included; a word changes two counts (about 20 "
            "operations and as many look-ups)",
        )


class _Bag:
    """Words and pairs so far: the sum of weight x value, and the sum of squared values, kept up to date."""

    def __init__(self, weights: dict[str, tuple[float, float]]) -> None:
        self.weights = weights
        self.counts: dict[str, int] = {}
        self.sum, self.squares = 0.0, 0.0
        self.last: str | None = None

    def add(self, word: str) -> None:
        """Takes a finished word in."""
        for name in self._names(word):
            if (entry := self.weights.get(name)) is not None:
                gain, square = self._change(name, entry)
                self.sum, self.squares = self.sum + gain, self.squares + square
                self.counts[name] = self.counts.get(name, 0) + 1
        self.last = word

    def decision(self, unfinished: str | None) -> float:
        """Sum over the norm, as if the unfinished word were finished."""
        total, squares = self.sum, self.squares
        if unfinished is not None:
            for name in self._names(unfinished):
                if (entry := self.weights.get(name)) is not None:
                    gain, square = self._change(name, entry)
                    total, squares = total + gain, squares + square
        return total / math.sqrt(squares) if squares > 1e-12 else 0.0

    def _names(self, word: str) -> list[str]:
        return [word] if self.last is None else [word, f"{self.last} {word}"]

    def _change(self, name: str, entry: tuple[float, float]) -> tuple[float, float]:
        """What one more of it adds to both sums: a value is (1 + ln count) x idf."""
        idf, weight = entry
        count = self.counts.get(name, 0)
        before = (1 + math.log(count)) * idf if count else 0.0
        after = (1 + math.log(count + 1)) * idf
        return weight * (after - before), after * after - before * before
