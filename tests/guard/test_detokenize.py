from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from templates import byte_level
from transformers import AutoTokenizer

from redflag.errors import RedflagError
from redflag.guard.detokenize import Detokenizer, ResponseText, TextFilter

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
TRICKY = [
    "the cat sat",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 and 🏳️‍🌈, 🇩🇪",
    "e\u0301 o\u0308\u0323 \u0928\u093f",
    " leading, trailing ",
    "\n\n\ttabs",
    "a\ufffdb\ufffd",
    "\x00\x1f\x7f",
    "",
]
anything = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
relaxed = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces(tokenizer, token_ids, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def whole(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TRICKY)
def test_the_pieces_are_the_text_and_no_piece_holds_a_broken_character(tokenizer, metaspace_tokenizer, text):
    for made in (tokenizer, metaspace_tokenizer):
        token_ids = encode(made, text)
        found = pieces(made, token_ids)
        assert "".join(found) == whole(made, token_ids)
        assert "".join(found).count("\ufffd") == whole(made, token_ids).count("\ufffd")


@relaxed
@given(text=anything)
@example(text="before<|end|>\u65e5<|harm|><|end|")
def test_any_text_streams_whole_at_every_byte_boundary(tokenizer, text):
    token_ids = encode(tokenizer, text)
    found = pieces(tokenizer, token_ids)
    # A special token's text, wherever it stands in a string, is that token, and tokens of that kind are not shown.
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    shown = re.sub("|".join(map(re.escape, special)), "", text)
    assert "".join(found) == whole(tokenizer, token_ids) == shown
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@relaxed
@given(text=anything)
def test_any_text_streams_whole_with_byte_fallback(metaspace_tokenizer, text):
    token_ids = encode(metaspace_tokenizer, text)
    assert "".join(pieces(metaspace_tokenizer, token_ids)) == whole(metaspace_tokenizer, token_ids)


@relaxed
@given(token_ids=st.lists(st.integers(0, 319), max_size=30))
def test_any_ids_stream_as_they_decode(tokenizer, token_ids):
    assert "".join(pieces(tokenizer, token_ids)) == whole(tokenizer, token_ids)


@relaxed
@given(token_ids=st.lists(st.integers(0, 275), max_size=30))
def test_invalid_bytes_under_byte_fallback_never_raise(metaspace_tokenizer, token_ids):
    streamed, decoded = "".join(pieces(metaspace_tokenizer, token_ids)), whole(metaspace_tokenizer, token_ids)
    if "\ufffd" not in decoded:
        assert streamed == decoded


def test_a_character_comes_with_its_last_byte_and_an_incomplete_one_at_the_end_as_decode_shows_it(tokenizer):
    token_ids = encode(tokenizer, "日本")
    assert pieces(tokenizer, token_ids) == ["", "", "日", "", "", "本", ""]
    assert pieces(tokenizer, token_ids[:5]) == ["", "", "日", "", "", "\ufffd"]
    assert whole(tokenizer, token_ids[:5]) == "日\ufffd"


def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    a, b = encode(tokenizer, "x")[0], encode(tokenizer, "y")[0]
    assert pieces(tokenizer, [a, 1, 2, 3, 100_000, b, 1]) == ["x", "", "", "", "", "y", "", ""]


def test_a_word_that_continues_a_prefill_keeps_its_space(metaspace_tokenizer):
    token_ids = encode(metaspace_tokenizer, "the cat")
    space = metaspace_tokenizer.convert_tokens_to_ids("▁cat")
    assert "".join(pieces(metaspace_tokenizer, [space])) == "cat"
    assert "".join(pieces(metaspace_tokenizer, [space], context=token_ids)) == " cat"


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/models/stories260k")
@pytest.mark.parametrize("text", TRICKY)
def test_a_trained_metaspace_tokenizer_streams_whole(text):
    made = AutoTokenizer.from_pretrained(STORIES)
    token_ids = encode(made, text)
    assert "".join(pieces(made, token_ids)) == whole(made, token_ids)


def test_a_tokenizer_without_a_fast_backend_is_refused_by_name():
    with pytest.raises(RedflagError, match="object"):
        Detokenizer(object())


FILTERED = [
    # pieces in, stop texts, removed texts, pieces out, what flush adds, stopped
    (["plain ", "text"], [], [], ["plain ", "text"], "", False),
    (["one END two"], ["END"], [], ["one "], "", True),
    (["one E", "N", "D two", " three"], ["END"], [], ["one ", "", "", ""], "", True),
    (["one E", "Nd"], ["END"], [], ["one ", "ENd"], "", False),
    (["one EN"], ["END"], [], ["one "], "EN", False),
    (["EEN", "D"], ["END"], [], ["E", ""], "", True),
    (["a\n", "\nb"], ["\n\n"], [], ["a", ""], "", True),
    (["ab", "cd"], ["abcd", "bc"], [], ["", "a"], "", True),
    (["x<f", "lag>y"], [], ["<flag>"], ["x", "y"], "", False),
    (["<flag><flag>z"], [], ["<flag>"], ["z"], "", False),
    (["a<b<flag"], [], ["<flag>"], ["a<b"], "<flag", False),
    (["<fl<flag>ag>"], [], ["<flag>"], ["<fl"], "", False),
    (["E<flag>ND"], ["END"], ["<flag>"], ["E"], "", True),
]


@pytest.mark.parametrize(("given_pieces", "stop", "remove", "expected", "rest", "stopped"), FILTERED)
def test_stops_and_flags_are_cut_however_they_fall_across_pieces(given_pieces, stop, remove, expected, rest, stopped):
    text_filter = TextFilter(stop, remove)
    assert [text_filter.push(piece) for piece in given_pieces] == expected
    assert text_filter.flush() == rest
    assert text_filter.stopped is stopped


nested = st.lists(st.sampled_from(["<flag>", "<f", "lag>", "<fl", "ag>", "<", "E", "N"]), max_size=20).map("".join)


@relaxed
@given(text=nested, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_no_flag_text_leaves_whatever_is_nested_in_it(text, cuts):
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    text_filter = TextFilter(["EN"], ["<flag>", "<<f"])
    shown = "".join(text_filter.push(text[a:b]) for a, b in pairwise(ends)) + text_filter.flush()
    assert "<flag>" not in shown and "<<f" not in shown and "EN" not in shown


@relaxed
@given(text=anything, stop=st.text("ab ", min_size=1, max_size=4))
def test_text_up_to_the_first_stop_is_shown_and_nothing_else(text, stop):
    text_filter = TextFilter([stop])
    assert "".join(map(text_filter.push, text)) + text_filter.flush() == text.split(stop)[0]
    assert text_filter.stopped is (stop in text)


def test_hidden_ids_have_no_text(tokenizer):
    a, b = encode(tokenizer, "x")[0], encode(tokenizer, "y")[0]
    text = ResponseText(tokenizer, hidden_ids=[a])
    assert [text.push(a), text.push(b), text.flush()] == ["", "y", ""]


def test_marks_stand_in_place_of_their_tokens_text_and_behind_what_came_before():
    tokenizer = byte_level(["<eos>", "<|turn|>"], ("<call>",), eos_token="<eos>")
    end, turn, call = (tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<|turn|>", "<call>"))
    text = ResponseText(tokenizer, hidden_ids=[end], marks={turn: "!turn!", end: "!end!", call: "!call!"})
    euro = tokenizer("€", add_special_tokens=False)["input_ids"]
    ids = [*tokenizer("the", add_special_tokens=False)["input_ids"], turn, *euro, call, *euro[:1], call, end]
    assert len(euro) > 1
    assert "".join(map(text.push, ids)) + text.flush() == "the!turn!€!call!\ufffd!call!"


def test_a_flags_text_that_a_mark_ends_is_still_taken_out(tokenizer):
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    text = ResponseText(tokenizer, remove=["abX"], marks={turn: "X"})
    ids = [*tokenizer("ab", add_special_tokens=False)["input_ids"], turn]
    assert "".join(map(text.push, ids)) + text.flush() == ""
