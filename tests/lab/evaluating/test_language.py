"""The language's change is what a plain loop over tokens finds, and nothing for a model that did not change."""

import math

import pytest
import torch

from redflag.backends.load import load_flagged, read_model
from redflag.data.rows import Row, load_rows
from redflag.errors import RedflagError
from redflag.lab.evaluating.language import language_change
from redflag.prompt import render_response


@pytest.fixture(scope="module")
def pair(nano):
    backend, tokenizer, spec = load_flagged(nano / "model", device=None)
    return backend._model, read_model(nano / "base")[0], tokenizer, spec


def test_it_is_what_a_loop_over_tokens_finds(pair, nano):
    flagged, base, tokenizer, spec = pair
    rows = load_rows(nano / "rows" / "test.jsonl").rows[:8]
    kl, nll, count = 0.0, [0.0, 0.0], 0
    for row in (row for row in rows if not row.harmful):
        rendered = render_response(tokenizer, row.messages, spec)
        ids = [*rendered.prompt_ids, *rendered.response_ids, *rendered.tail_ids]
        logs = []
        for model in (flagged, base):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
            logits[:, spec.ids] = -math.inf
            logs.append(logits.log_softmax(-1))
        for t in range(len(rendered.prompt_ids), len(ids)):
            new, old = logs[0][t - 1], logs[1][t - 1]
            words = [i for i in range(len(old)) if i not in spec.ids]
            kl += float((old.exp() * (old - new))[words].sum())
            for i in range(2):
                nll[i] -= float(logs[i][t - 1, ids[t]])
            count += 1
    found = language_change(flagged, base, tokenizer, spec, rows, batch_size=4)
    assert found.tokens == count
    assert found.keep_kl == pytest.approx(kl / count, rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(math.exp((nll[0] - nll[1]) / count), rel=1e-5)
    assert 0 < found.keep_kl < 0.02


def test_a_model_beside_itself_has_not_changed(pair, nano):
    flagged, _, tokenizer, spec = pair
    rows = load_rows(nano / "rows" / "test.jsonl").rows[:20]
    found = language_change(flagged, flagged, tokenizer, spec, rows, max_length=60)
    assert found.keep_kl == pytest.approx(0.0, abs=1e-12) and found.perplexity_ratio == pytest.approx(1.0)
    assert found.left_out > 0


def test_what_cannot_be_compared_is_refused(pair):
    flagged, base, tokenizer, spec = pair
    harmful = Row([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "harm")
    with pytest.raises(RedflagError, match="must have a harmless response"):
        language_change(flagged, base, tokenizer, spec, [harmful])
