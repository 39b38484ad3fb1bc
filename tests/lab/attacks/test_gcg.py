"""GCG: what it finds is better than what it began with, survives as text, and is the same for the same seed."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from tiny_target import harmful_row, same_weights, tiny_target, tiny_tokenizer, weights

from redflag.backends.load import load_flagged
from redflag.data.rows import load_rows
from redflag.errors import RedflagError
from redflag.lab.attacks import Target
from redflag.lab.attacks.gcg import GCG, allowed_ids
from redflag.lab.attacks.objective import Harm
from redflag.lab.attacks.run_attacks import record
from redflag.watching.thresholds import Thresholds

SMALL = dict(steps=6, width=12, top_k=40, suffix=" x x x", target_tokens=4, max_new_tokens=6)


def total(detail, at, weight):
    return detail["response_loss"][at] + weight * detail["flag_loss"][at]


@pytest.fixture(params=[True, False], ids=["adaptive", "nanogcg"])
def attack(request):
    if not request.param:
        pytest.importorskip("nanogcg")
    return GCG(adaptive=request.param, **SMALL)


def test_the_objective_falls_the_suffix_survives_and_the_model_stays(attack):
    target = tiny_target(0.5)
    before = weights(target.model)
    rows = [harmful_row(), harmful_row(1)]
    attempts = list(attack.run(target, rows, 0))
    assert [attempt.request for attempt in attempts] == ["h0", "h1"]
    weight = attack.flag_weight if attack.adaptive else 0.0
    for row, attempt in zip(rows, attempts, strict=True):
        assert total(attempt.detail, 1, weight) < total(attempt.detail, 0, weight)
        suffix = attempt.detail["suffix"]
        assert attempt.messages[-1]["content"] == row.messages[0]["content"] + suffix
        ids = target.tokenizer(suffix, add_special_tokens=False)["input_ids"]
        harm = Harm(target, row, " x x x", 4)
        assert harm.survives(ids) and not set(ids) & set(target.spec.ids)
        assert len(attempt.flag_probs) == len(attempt.token_ids) <= 6
        assert attempt.queries == 6 * 12 + 1
    assert same_weights(target.model, before)
    assert all(parameter.grad is None for parameter in target.model.parameters())


def test_the_same_seed_gives_the_same_suffix_and_leaves_torchs_generator_alone(attack):
    target = tiny_target()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    runs = [[a.detail["suffix"] for a in attack.run(target, [harmful_row()], seed)] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_adaptive_search_keeps_the_flag_lower_than_one_that_does_not_look_at_it():
    target = tiny_target()
    rows = [harmful_row(i) for i in range(3)]
    harm = Harm(target, rows[0], " x x x", 4)
    with torch.no_grad():  # A flag that is on along the target.
        ids = torch.tensor([[*harm.before, *harm.suffix, *harm.after, *harm.target]])
        hidden = target.model.get_decoder()(input_ids=ids).last_hidden_state[0, -5:].mean(0)
        target.model.get_output_embeddings().weight[target.spec.ids[0]] = hidden * 2.0
    blind, looking = (
        [a.detail["flag_loss"][1] for a in GCG(flag_weight=weight, **SMALL).run(target, rows, 0)]
        for weight in (0.0, 5.0)
    )
    assert sum(looking) < sum(blind)


def test_a_suffix_is_made_of_printable_ordinary_tokens():
    target = tiny_target()
    allowed = allowed_ids(target).tolist()
    assert not set(allowed) & {*target.tokenizer.all_special_ids, *target.tokenizer.added_tokens_decoder}
    texts = target.tokenizer.batch_decode([[i] for i in allowed])
    assert len(texts) > 50 and all(text.isascii() and text.isprintable() for text in texts)


def test_without_nanogcg_the_plain_search_is_refused_and_the_adaptive_one_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    monkeypatch.delitem(sys.modules, "nanogcg.gcg", raising=False)
    target = tiny_target()
    with pytest.raises(RedflagError, match=r"nanogcg must be installed .* Run `pip install nanogcg`"):
        next(GCG(adaptive=False).run(target, [harmful_row()], 0))
    assert importlib.util.find_spec("redflag.lab.attacks.gcg")
    assert next(GCG(**{**SMALL, "steps": 1}).run(target, [harmful_row()], 0)).detail["suffix"]


def test_other_thresholds_do_not_search_anew(tmp_path, monkeypatch):
    target, attack, path = tiny_target(0.5), GCG(**{**SMALL, "steps": 1}), tmp_path / "gcg.jsonl"
    target.thresholds = Thresholds.manual(0.5, target.spec.categories, run_id=target.spec.run_id)
    found, _ = record(target, attack, [harmful_row()], path, 0)
    target.thresholds = Thresholds.manual(0.9, target.spec.categories, run_id=target.spec.run_id)
    monkeypatch.setattr(target, "answers", lambda *arguments, **options: pytest.fail("it was asked again"))
    assert record(target, attack, [harmful_row()], path, 0)[0] == found


def test_without_weights_it_is_refused():
    target = Target(object(), tiny_tokenizer(), tiny_target().spec)
    with pytest.raises(RedflagError, match="needs the target's weights"):
        next(GCG().run(target, [harmful_row()], 0))


def test_names_tell_the_two_apart():
    assert (GCG().name, GCG(adaptive=False).name) == ("GCG, adaptive", "GCG")


def test_in_the_nano_world_response_and_flag_losses_fall(nano):
    backend, tokenizer, spec = load_flagged(nano / "model", device=None)
    target = Target(backend, tokenizer, spec, model=backend._model)
    rows = [row for row in load_rows(nano / "rows" / "test.jsonl") if row.source == "nano:direct"][:2]
    for attempt in GCG(steps=4, width=16).run(target, rows, 0):
        assert total(attempt.detail, 1, 0.2) < total(attempt.detail, 0, 0.2)


def test_a_request_that_fills_the_context_is_left_out(attack):
    target = tiny_target()
    long = harmful_row(2)
    long.messages[0]["content"] = " ".join(["tell the cat"] * 60)
    assert [a.request for a in attack.run(target, [long, harmful_row()], 0)] == ["h0"]
