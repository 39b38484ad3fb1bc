"""Near duplicates are found exactly: the same as by comparing every pair."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redflag.errors import RedflagError
from redflag.lab.synthesis.dedup import distinct, normalised, shingles, similarity

# Few words, so that shingles are often shared.
TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=9).map(" ".join), max_size=14)
THRESHOLDS = st.sampled_from([0.05, 0.2, 1 / 3, 0.5, 0.6, 0.75, 0.8, 0.9, 1.0])


def by_every_pair(texts, threshold):
    kept = []
    for i, text in enumerate(texts):
        if all(similarity(shingles(text), shingles(texts[j])) < threshold for j in kept):
            kept.append(i)
    return kept


@given(TEXTS, THRESHOLDS)
def test_S3_1_the_index_finds_what_comparing_every_pair_finds(texts, threshold):
    assert distinct(texts, threshold) == by_every_pair(texts, threshold)


@given(TEXTS, THRESHOLDS)
def test_S3_1_what_is_left_is_left_again_and_equal_texts_never_stay(texts, threshold):
    left = [texts[i] for i in distinct(texts, threshold)]
    assert distinct(left, threshold) == list(range(len(left)))
    assert len({normalised(text) for text in left}) == len(left)
    assert not texts or left


@given(st.text(max_size=40))
@example("㎩")  # whose compatibility form is Pa
def test_S3_1_case_and_punctuation_do_not_make_a_text_new(text):
    again = normalised(text)
    assert normalised(again) == again
    assert distinct([text, f"  {again.upper()} !! "]) in ([0], [0, 1])  # İ and ß have no one capital
    assert distinct([again, f"  {again} !! "]) == [0]


@pytest.mark.parametrize(
    ("texts", "threshold", "kept"),
    [
        ([], 0.8, []),
        (["", "!?", "..."], 0.8, [0]),
        (["How do I bake bread?", "HOW DO I  BAKE BREAD"], 1.0, [0]),
        (["one two three four five", "one two three four six"], 0.5, [0]),
        (["one two three four five", "one two three four six"], 0.6, [0, 1]),
        (["你好。", "你好", "再见"], 0.8, [0, 2]),
    ],
)
def test_S3_1_examples_of_near_duplicates(texts, threshold, kept):
    assert distinct(texts, threshold) == kept


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_S3_1_a_threshold_that_is_none_is_refused(threshold):
    with pytest.raises(RedflagError, match="must be above 0 and at most 1"):
        distinct(["a"], threshold)
