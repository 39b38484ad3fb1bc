"""The bag of words keeps up token by token, and says at each what scikit-learn says of the text so far."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from tiny import WORDS

from redflag.guard.detokenize import Detokenizer
from redflag.lab.baselines.tfidf import TfidfBaseline
from redflag.models.pretrain import train_tokenizer

TEXTS = ["the cat sat on the mat", "a dog ate the Cat", "rain, rain and fish", "ate a mat and ate"]


def baseline():
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit(TEXTS)
    weights = np.random.default_rng(0).normal(size=len(vectorizer.idf_))
    made = TfidfBaseline(None)
    names = vectorizer.get_feature_names_out()
    made._weights = {n: (float(i), float(w)) for n, i, w in zip(names, vectorizer.idf_, weights, strict=True)}
    made._intercept = -0.25
    return made, lambda text: float((vectorizer.transform([text]) @ weights)[0]) - 0.25


PIECES = st.lists(st.sampled_from(["the", " cat", " Cat", "ate", " ", "\n", ",", " a", " rain", "s", "'", "_", "é"]))


@given(PIECES)
def test_every_step_is_what_scikit_learn_says_of_the_text_so_far(pieces):
    made, whole = baseline()
    expected = [whole("".join(pieces[: i + 1])) for i in range(len(pieces))]
    assert made.logits(pieces) == pytest.approx(expected, abs=1e-9)


def test_it_learns_which_words_mark_harm(context, rows):
    made = TfidfBaseline(context, min_df=1)
    made.fit(rows)
    recording = made.score(rows)
    peaks = np.array([recording.steps(i).max() for i in range(len(rows))])
    assert peaks[recording.harmful].mean() > peaks[~recording.harmful].mean() + 0.1
    assert all(recording.steps(i)[0, 0] == 0 for i in range(len(rows)))


TOKENIZER = train_tokenizer([" ".join(WORDS)] * 5, 320)


@given(st.text(max_size=30))
def test_pieces_end_to_end_are_the_text(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces = list(map(Detokenizer(TOKENIZER).push, ids))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_of_several_tokens_comes_with_its_last_one():
    ids = TOKENIZER("a🦊b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    assert list(map(Detokenizer(TOKENIZER).push, ids)) == ["a", "", "", "", "🦊", "b"]


def test_an_untrained_word_changes_nothing():
    made, _ = baseline()
    assert made.logits([" unheard", " of"]) == [-0.25, -0.25]
    assert not math.isnan(made.logits([""])[0])
