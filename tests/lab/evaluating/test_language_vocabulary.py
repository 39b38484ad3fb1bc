"""The language's change: flags behind the base's vocabulary, and no float64, which GPUs of Apple lack."""

import copy
import math

import pytest
import torch
from tiny import TEXT, build, make_rows
from torch.utils._python_dispatch import TorchDispatchMode

from redflag.flags import FlagSpec, attach
from redflag.lab.evaluating.language import language_change
from redflag.models.pretrain import train_tokenizer
from redflag.prompt import render_response


class RefuseFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError(f"{function} made a float64 tensor")
        return result


def flagged_pair(tied, flags):
    """A base and a model that has drifted from it, with so many flags; eight fill the tokenizer's reserved tokens."""
    tokenizer = train_tokenizer([TEXT] * 5, 320)
    base = build("llama", len(tokenizer), tied)
    flagged, own = copy.deepcopy(base), copy.deepcopy(tokenizer)
    spec = attach(flagged, own, FlagSpec.of(*(f"kind-{i}" for i in range(flags))))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in flagged.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    behind = sum(index >= len(tokenizer) for index in spec.ids)
    assert behind == max(0, flags - 8)
    # Those in front of it are taken away, so that what is left are flags without a column in the base.
    return flagged, base, own, FlagSpec(spec.flags[-behind:]) if behind and flags == 9 else spec


def by_loop(flagged, base, tokenizer, spec, rows):
    divergence, nll, count = 0.0, [0.0, 0.0], 0
    for row in (row for row in rows if not row.harmful):
        rendered = render_response(tokenizer, row.messages, spec)
        ids = [*rendered.prompt_ids, *rendered.response_ids, *rendered.tail_ids]
        logs = []
        with torch.no_grad():
            for model in (flagged, base):
                logits = model(input_ids=torch.tensor([ids])).logits[0].double()
                words = [i for i in range(base.config.vocab_size) if i not in spec.ids]
                logs.append(dict(zip(words, logits[:, words].log_softmax(-1).T.tolist(), strict=True)))
        new, old = logs
        for t in range(len(rendered.prompt_ids), len(ids)):
            divergence += sum(math.exp(old[i][t - 1]) * (old[i][t - 1] - new[i][t - 1]) for i in old)
            nll = [total - log[ids[t]][t - 1] for total, log in zip(nll, logs, strict=True)]
            count += 1
    return divergence / count, math.exp((nll[0] - nll[1]) / count)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("flags", [1, 9, 10], ids=["inside", "all behind", "inside and behind"])
def test_flags_behind_the_bases_vocabulary_are_left_out_of_both_distributions(tied, flags):
    flagged, base, tokenizer, spec = flagged_pair(tied, flags)
    rows = make_rows(9)
    with RefuseFloat64():
        found = language_change(flagged, base, tokenizer, spec, rows, batch_size=4)
    divergence, ratio = by_loop(flagged, base, tokenizer, spec, rows)
    assert divergence > 1e-3
    assert found.keep_kl == pytest.approx(divergence, rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
