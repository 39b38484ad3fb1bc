"""The flags' rows before the first step: log-odds near -4 on ordinary text, and nothing else touched."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from tiny import build, make_rows
from transformers import PhiConfig, PhiForCausalLM

from redflag import cli
from redflag.data.rows import write_rows
from redflag.flags import FlagSpec, attach
from redflag.training import train
from redflag.training.adapter import output_head
from redflag.training.encode import PlacementConfig, build_dataset, encode
from redflag.training.loss import flag_log_odds
from redflag.training.start import _ordinary_states, fit_flag_rows, may_fit


def model_of(kind, vocabulary):
    if kind == "bias":
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        model = PhiForCausalLM(PhiConfig(vocab_size=vocabulary, **sizes))
        torch.nn.init.normal_(model.lm_head.bias)
        # As in models that learnt something, a direction that all states share.
        torch.nn.init.constant_(model.model.final_layernorm.bias, 3.0)
        return model.eval()
    family, _, how = kind.partition(" ")
    model = build(family, vocabulary, how != "untied").eval()
    if how == "capped":
        model.config.final_logit_softcapping = 8.0
    return model


@pytest.mark.parametrize("categories", [("harm",), ("harm", "fraud", "weapons")])
@pytest.mark.parametrize("kind", ["llama", "llama untied", "gemma3 capped", "bias"])
def test_log_odds_on_harmless_responses_come_near_minus_four(tokenizer, kind, categories):
    model = model_of(kind, len(tokenizer))
    spec = attach(model, tokenizer, FlagSpec.of(*categories))
    ids = torch.tensor(spec.ids)
    before = copy.deepcopy(model.state_dict())
    examples = build_dataset(make_rows(48), tokenizer, spec, 64)

    def distance():
        return flag_log_odds(_ordinary_states(model, examples), output_head(model, spec), ids) + 4

    first = distance()
    fit_flag_rows(model, spec, examples)
    assert abs(distance().mean()) < (0.1 if kind == "bias" else 1.0)
    assert distance().square().mean() < 0.8 * first.square().mean()
    rows = model.get_output_embeddings().weight[ids].clone()
    for name, weight in model.state_dict().items():
        others = torch.ones(len(weight), dtype=torch.bool)
        if weight.shape[0] == before["lm_head.weight"].shape[0]:
            others[ids] = False
        assert torch.equal(weight[others], before[name][others])
    if kind == "llama untied":
        assert torch.equal(model.get_input_embeddings().weight, before["model.embed_tokens.weight"])
    model.load_state_dict(before)
    fit_flag_rows(model, spec, examples)
    assert torch.equal(rows, model.get_output_embeddings().weight[ids])


def test_the_states_are_those_that_judge_harmless_responses(flagged):
    model, tokenizer, spec, _ = flagged
    row = make_rows(2)[1]
    example = encode(row, tokenizer, spec, 64, 0)
    states = _ordinary_states(model.eval(), Dataset.from_list([dict(example)]))
    ids = torch.tensor([example["input_ids"]])
    whole = model.model(ids).last_hidden_state[0]
    assert torch.allclose(states, whole[example["response_start"] - 1 : -1], atol=1e-5)


def test_without_harmless_rows_nothing_changes(flagged):
    model, tokenizer, spec, _ = flagged
    before = copy.deepcopy(model.state_dict())
    fit_flag_rows(model, spec, build_dataset(make_rows(1), tokenizer, spec, 64))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("tied", "placement", "in_context", "fitted"),
    [
        (True, "dense", 0.0, True),
        (True, "first", 0.0, True),
        (True, "dense", 0.2, False),
        (True, "insert", 0.0, False),
        (True, "open", 0.0, False),
        (True, "until", 0.0, False),
        (False, "insert", 0.0, True),
        (False, "dense", 0.2, True),
    ],
)
def test_rows_that_are_read_keep_their_meaning(tied, placement, in_context, fitted):
    config = PlacementConfig(placement, in_context=in_context)
    assert may_fit(build("llama", 320, tied), config) == fitted


def test_the_verb_fits_them_unless_told_otherwise(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    build("llama", len(tokenizer)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    write_rows("rows.jsonl", make_rows(48))
    fitted = []
    monkeypatch.setattr(train, "fit_flag_rows", lambda *given: fitted.append(fit_flag_rows(*given)))
    fixed = ["train", "--model", "base", "--input", "rows.jsonl", "--max_steps", "1", "--max_length", "64"]
    fixed += ["--use_cpu", "true", "--disable_tqdm", "true"]
    for name, extra, count in (("a", [], 1), ("b", ["--flag_start", "mean"], 1), ("c", ["--placement", "insert"], 1)):
        assert cli.main([*fixed, "--output_dir", name, *extra]) == 0
        assert len(fitted) == count
    assert cli.main([*fixed, "--output_dir", "d", "--flag_start", "zero"]) == 2
    assert "flag_start must be one of fitted, mean (got 'zero')" in capsys.readouterr().err
