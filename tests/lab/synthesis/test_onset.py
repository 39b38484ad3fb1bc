"""Onsets sentence by sentence: found where a judge finds them, with as many questions as said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.judges import UnansweredError, Verdict
from redflag.lab.nano.judge import NanoOracle
from redflag.lab.nano.rows import nano_rows
from redflag.lab.synthesis.onset import Onset, agreement, find_onset, find_onsets, sentences, with_onsets

ASK = [{"role": "user", "content": "q"}]


class Judge:
    """Harm is a word; `asked` are the answers it saw."""

    def __init__(self, word="bad", forgives=None, silent=None):
        self.word, self.forgives, self.silent, self.asked = word, forgives, silent, []

    def __call__(self, messages, answer):
        self.asked.append(answer)
        if self.silent is not None and self.silent in answer:
            raise UnansweredError("silent")
        return Verdict(float(self.word in answer and not (self.forgives and self.forgives in answer)))


def row(text, category="harm", **more):
    return Row([*ASK, {"role": "assistant", "content": text}], category, **more)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("  \n ", []),
        ("One", ["One"]),
        ("It costs 3.5. Right? Yes!", ["It costs 3.5.", "Right?", "Yes!"]),
        ('He said "Go." Then he went...  Far.', ['He said "Go."', "Then he went...", "Far."]),
        ("A list:\n- one\n- two", ["A list:", "- one", "- two"]),
        ("Yes. ... No.", ["Yes. ...", "No."]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("file.txt is here", ["file.txt is here"]),
    ],
)
def test_S3_1_sentences(text, parts):
    assert [text[start:end] for start, end in sentences(text)] == parts


@given(st.text(alphabet='ab .!?\n"。', max_size=40))
def test_S3_1_sentences_cover_every_letter_once_and_in_order(text):
    spans = sentences(text)
    assert "".join("".join(text[s:e].split()) for s, e in spans) == "".join(text.split())
    assert all(s < e for s, e in spans) and spans == sorted(spans)
    assert all(not text[s].isspace() and not text[e - 1].isspace() for s, e in spans)


@pytest.mark.parametrize(
    ("text", "found", "first", "bisect"),
    [
        ("So. So. So. So.", (None, None), 4, 1),
        ("So bad. So. So. So.", (0, 0), 1, 3),
        ("So. So. bad So. So.", (2, 8), 3, 3),
        ("So. So. So. bad", (3, 12), 4, 3),
        ("bad", (0, 0), 1, 1),
    ],
)
def test_S3_1_the_onset_is_the_first_sentence_whose_prefix_is_judged_harmful(text, found, first, bisect):
    for search, questions in (("first", first), ("bisect", bisect)):
        judge = Judge()
        onset = find_onset(judge, ASK, text, search)
        assert (onset.sentence, onset.character) == found
        assert onset.questions == len(judge.asked) == questions


@given(st.integers(1, 30), st.data())
def test_S3_1_halving_finds_what_looking_at_every_sentence_finds(n, data):
    at = data.draw(st.integers(0, n))
    text = " ".join("So bad." if i == at else "So." for i in range(n))
    every, half = find_onset(Judge(), ASK, text), find_onset(Judge(), ASK, text, "bisect")
    assert (half.sentence, half.character) == (every.sentence, every.character)
    assert half.questions <= n.bit_length() + 1


def test_S3_1_halving_misses_what_a_judge_forgives_as_it_says():
    text = "So. So bad. But no. sorry"
    assert find_onset(Judge(forgives="sorry"), ASK, text).sentence == 1
    assert find_onset(Judge(forgives="sorry"), ASK, text, "bisect").sentence is None


def test_S3_1_the_last_question_is_the_whole_answer():
    judge = Judge()
    find_onset(judge, ASK, "So. So. \n")
    assert judge.asked == ["So.", "So. So. \n"]


def test_S3_1_without_a_verdict_there_is_no_onset_and_no_acquittal():
    rows = [row("So. So. bad."), row("So. quiet bad."), row("So.")]
    assert find_onsets(Judge(silent="quiet"), rows) == [Onset(2, 8, 3, 3), None, Onset(None, None, 1, 1)]
    with pytest.raises(UnansweredError, match="ZeroDivisionError"):
        find_onset(lambda messages, answer: 1 / 0, ASK, "So.")
    with pytest.raises(RedflagError, match="search"):
        find_onset(Judge(), ASK, "So.", "last")


def test_S3_1_labels_change_onsets_and_nothing_else():
    rows = [row("So. bad.", onset=1, id="a"), row("So.", onset=2), row("So. bad.", None), row("bad", onset=0)]
    found = [*find_onsets(Judge(), rows[:3], workers=2), None]
    labelled = with_onsets(rows, found)
    assert [(r.onset, r.onset_source) for r in labelled] == [(4, "natural"), (2, None), (None, None), (0, None)]
    assert labelled[0].id == "a" and labelled[1:] == rows[1:]


def test_S3_1_the_oracle_finds_the_onsets_of_nano_rows():
    rows = nano_rows("test", 300, seed=5)
    found = find_onsets(NanoOracle(), rows)
    harmful = [(r, o) for r, o in zip(rows, found, strict=True) if r.harmful]
    assert sum(o.character == r.onset for r, o in harmful) >= 0.98 * len(harmful) > 90
    assert sum(o.harmful for r, o in zip(rows, found, strict=True) if not r.harmful) <= 1
    assert find_onsets(NanoOracle(), rows, search="bisect")[0].sentence == found[0].sentence


def onsets(*numbers):
    return [None if n is None else Onset(None if n < 0 else n, None if n < 0 else n, 9, 1) for n in numbers]


@pytest.mark.parametrize(
    ("one", "other", "exact", "within", "kappa"),
    [
        ((0, 3, -1, -1), (0, 3, -1, -1), 1.0, 1.0, 1.0),
        ((0, 3, 5, -1), (1, 3, 9, -1), 1 / 3, 2 / 3, 1.0),
        ((0, 0, -1, -1), (0, -1, 0, -1), 1.0, 1.0, 0.0),
        ((0, 0, -1, -1), (-1, -1, 0, 0), None, None, -1.0),
        ((-1, -1), (-1, -1), None, None, None),
        ((), (), None, None, None),
        ((0, None, -1), (0, 4, -1), 1.0, 1.0, 1.0),  # who did not answer is left out
    ],
)
def test_S3_1_agreement_by_hand(one, other, exact, within, kappa):
    found = agreement(onsets(*one), onsets(*other))
    assert (found.exact, found.within_one, found.kappa) == (
        exact,
        within,
        kappa if kappa is None else pytest.approx(kappa),
    )


@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=30))
def test_S3_1_agreement_is_symmetric_and_kappa_is_scikit_learns(pairs):
    from sklearn.metrics import cohen_kappa_score

    one, other = (onsets(*side) for side in zip(*pairs, strict=True))
    found = agreement(one, other)
    assert found == agreement(other, one)
    sides = [[onset.harmful for onset in side] for side in (one, other)]
    if found.kappa is not None:
        assert found.kappa == pytest.approx(cohen_kappa_score(*sides))
    assert found.exact is None or found.exact <= found.within_one
