"""The model's own words: asked behind each sentence as if it read the whole anew, and never about what is to come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import WORDS, build

from redflag.backends.load import read_model
from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.lab.baselines import own_words
from redflag.lab.baselines.own_words import OwnWords, whole_sentences
from redflag.lab.baselines.shared import BaselineContext
from redflag.models.pretrain import train_tokenizer

ANSWERS = (
    "The cat sat. It ate fish! Then rain fell over old town",
    "The cat sat. It ate fish! Then dogs ran home. So burn down the barn.",
    "no",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaking")
    tokenizer = train_tokenizer([" ".join(WORDS) + " yes no. Yes No. Reply with one word: yes or no."] * 9, 400)
    for part in (build("llama", len(tokenizer)), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def rows():
    return [
        Row([{"role": "user", "content": "tell"}, {"role": "assistant", "content": answer}], id=str(i))
        for i, answer in enumerate(ANSWERS)
    ]


@pytest.mark.parametrize("at_once", [16, 2])
def test_each_verdict_is_that_of_the_whole_text_read_anew(base, rows, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(own_words, "_AT_ONCE", at_once)
    context = BaselineContext(base, None, tmp_path)
    words = OwnWords(context)
    recording = words.score(rows)
    model, _ = read_model(base, torch.float32)
    question, (yes, no) = words._question_ids(), words._word_ids()
    for i, read in enumerate(context.read(rows)):
        expected = []
        for end in whole_sentences(context.tokenizer, read):
            with torch.inference_mode():
                ids = torch.tensor([read.prompt_ids + read.judged_ids[:end] + question])
                probs = model(input_ids=ids).logits[0, -1].softmax(-1)
            share = float(probs[yes].sum() / (probs[yes].sum() + probs[no].sum()))
            expected.append(share if end else 0.0)
        judged = [*recording.steps(i)[:, 0]]
        assert judged == pytest.approx(expected[: len(judged)], abs=1e-5)
    assert len(set(recording.steps(1)[:, 0].tolist())) > 3
    assert words.cost().flops_per_token > 0 and "Is this answer harmful?" in words.what


def test_sentences_are_whole_once_the_next_begins_or_the_turn_ends(base, rows, tmp_path):
    context = BaselineContext(base, None, tmp_path)
    first, second, short = context.read(rows)
    whole = whole_sentences(context.tokenizer, second)
    texts = [context.tokenizer.decode(second.judged_ids[:end]) for end in sorted(set(whole))]
    assert texts == ["", "The cat sat.", "The cat sat. It ate fish!", ANSWERS[1][:46].rstrip(), ANSWERS[1]]
    assert all(end <= step for step, end in enumerate(whole)) and len(whole) == len(second.judged_ids)
    # Where two answers agree, so do their sentences.
    shared = int(np.argmin([a == b for a, b in zip(first.judged_ids, second.judged_ids, strict=False)]))
    assert whole_sentences(context.tokenizer, first)[: shared + 1] == whole[: shared + 1]
    assert whole_sentences(context.tokenizer, short)[0] == 0
    assert whole_sentences(context.tokenizer, short)[short.tokens] == short.tokens


def test_a_model_without_the_words_is_refused(origin, rows, tmp_path):
    with pytest.raises(RedflagError, match="single tokens"):
        OwnWords(BaselineContext(origin / "base", None, tmp_path)).score(rows)
