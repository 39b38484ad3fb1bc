"""What a base model reads about reflection: brackets in the right places that say the truth."""

from __future__ import annotations

import random
import re

from redflag.lab.nano.reflect import NANO_REFLECT, NANO_STAY, activity, cut, nano_reflections, reflection
from redflag.lab.nano.rows import nano_rows
from redflag.lab.nano.spans import harmful_onset
from redflag.models.pretrain import train_tokenizer

BRACKET = re.compile(r"<place>" + re.escape(NANO_REFLECT.cue) + r" ([\w ]+)\. Verdict: (harmful|harmless)\]")


def test_every_bracket_says_what_the_oracle_says():
    seen = {"harmful": 0, "harmless": 0}
    for messages in nano_reflections(800, ["<place>"]):
        content = messages[-1]["content"]
        marks = list(BRACKET.finditer(content))
        assert marks and len(marks) == content.count("<place>") == content.count("[")
        for mark in marks:
            so_far = BRACKET.sub("", content[: mark.start()])
            told, verdict = mark.groups()
            seen[verdict] += 1
            if harmful_onset(so_far) is not None:
                assert verdict == "harmful" and told.startswith("tells how to"), so_far
            # One or two words do not show the oracle yet what the sentence will be.
            elif verdict == "harmful":
                assert told.startswith("tells how to") or told == "is about to turn to harm"
    assert 0.15 < seen["harmful"] / sum(seen.values()) < 0.5


def test_after_a_harmful_verdict_no_harm_follows():
    for messages in nano_reflections(800, ["<place>"], seed=2):
        content = messages[-1]["content"]
        _, found, after = content.partition("Verdict: harmful]")
        if found:
            assert after.startswith(" ") and "Verdict" not in after
            assert harmful_onset(after.lstrip()) is None, after


def test_a_cut_lies_on_the_side_that_was_asked_for():
    rng = random.Random(0)
    for row in nano_rows("train", 400, seed=3):
        upto = cut(row, rng, harmful=False)
        assert 0 <= upto <= len(row.response) and (row.onset is None or upto <= row.onset)
        assert not activity(row, upto).startswith("tells") or row.onset == 0
        if row.harmful:
            upto = cut(row, rng, harmful=True)
            assert len(row.response[: row.onset].rstrip()) <= upto <= len(row.response)
            assert reflection(row, upto).endswith(" harmful]")


def test_documents_are_drawn_by_seed_from_requests_of_the_training_split():
    assert nano_reflections(50, ["<place>"]) == nano_reflections(50, ["<place>"])
    assert nano_reflections(50, ["<place>"]) != nano_reflections(50, ["<place>"], seed=1)
    prompts = {row.messages[-2]["content"] for row in nano_rows("test", 400)}
    assert not prompts & {messages[-2]["content"] for messages in nano_reflections(400, ["<place>"])}


def test_the_settings_fit_the_documents_and_the_words_begin_differently():
    documents = nano_reflections(400, ["<place>"])
    tokenizer = train_tokenizer((m["content"] for messages in documents for m in messages), 1200)
    first = [tokenizer(word)["input_ids"][0] for word in NANO_REFLECT.words]
    assert first[0] != first[1]
    for messages in documents[:100]:
        for bracket in re.findall(r" \[[^\]]*\]", messages[-1]["content"]):
            assert bracket.startswith(NANO_REFLECT.cue) and bracket.endswith(NANO_STAY.stop[0])
            hidden, _, verdict = bracket.partition(NANO_REFLECT.verdict_cue)
            assert hidden.endswith(NANO_REFLECT.stop[0]) and verdict[:-1] in NANO_REFLECT.words
            for settings, text in ((NANO_REFLECT, hidden), (NANO_STAY, bracket)):
                ids = tokenizer(text[len(settings.cue) :])["input_ids"]
                assert len(ids) <= settings.max_tokens
