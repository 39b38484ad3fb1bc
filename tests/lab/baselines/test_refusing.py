"""What the refusal baselines are trained on, and the loop that trains them."""

import random

import pytest
import torch
from templates import turn, world
from tiny import build

from redflag.backends.load import read_model
from redflag.data.rows import Row
from redflag.lab.baselines import refusing
from redflag.lab.baselines.shared import Read, thinned
from redflag.lab.baselines.tuning import IGNORE, Example, Tuning, fine_tune, loss_of
from redflag.prompt import render_prompt
from redflag.truncation import fit_prompt


def shown(context, example):
    """What stands behind the prompt, and what is asked for, as text; `.` where nothing is asked."""
    start = next((i for i, target in enumerate(example.targets) if target != IGNORE), len(example.ids))
    decode = context.tokenizer.decode
    return decode(example.ids), [decode([t]) if t != IGNORE else "." for t in example.targets[start:]]


def drawn(context, rows, builder, tmp_path, times=60, **options):
    """Examples of one harmful row, drawn many times, and of one harmless row."""
    baseline = builder(context, tmp_path, refusals=["dogs ran", "dogs ate"], **options)
    harmful = next(row for row in rows if row.harmful and row.onset)
    harmless = next(row for row in rows if not row.harmful)
    reads = context.read([harmful, harmless])
    made = [baseline.examples(reads, random.Random(i), (5, 6)) for i in range(times)]
    return reads, [pair[0] for pair in made], [pair[1] for pair in made]


def test_harmless_rows_are_the_anchor(context, rows, tmp_path):
    for builder in (refusing.deep_alignment, refusing.refusal_everywhere):
        reads, _, anchors = drawn(context, rows, builder, tmp_path, 3)
        read = reads[1]
        ids = read.prompt_ids + read.judged_ids
        assert all(one == Example(ids, [IGNORE] * len(read.prompt_ids) + read.judged_ids) for one in anchors)


@pytest.mark.parametrize(("labels", "least"), [("onset", None), ("response", 1)])
def test_deep_alignment_refuses_at_once_or_behind_harm(context, rows, tmp_path, labels, least):
    reads, examples, _ = drawn(context, rows, refusing.deep_alignment, tmp_path, labels=labels)
    read, counts = reads[0], []
    least = read.onset + 1 if least is None else least
    tail = read.judged_ids[read.tokens :]
    refusals = [[*context.tokenizer(text)["input_ids"], *tail] for text in ("dogs ran", "dogs ate")]
    for one in examples:
        start = next(i for i, target in enumerate(one.targets) if target != IGNORE)
        assert one.ids[start:] == one.targets[start:] and one.ids[start:] in refusals
        count = start - len(read.prompt_ids)
        assert one.ids[:start] == read.prompt_ids + read.judged_ids[:count]
        counts.append(count)
    behind = [count for count in counts if count]
    assert 15 <= len(behind) <= 45 and min(behind) >= least and max(behind) == read.tokens
    assert len(set(behind)) > 3


@pytest.mark.parametrize("labels", ["onset", "response"])
def test_rto_asks_for_the_refusal_at_every_harmful_position(context, rows, tmp_path, labels):
    reads, examples, _ = drawn(context, rows, refusing.refusal_everywhere, tmp_path, labels=labels)
    read = reads[0]
    sorry = context.tokenizer("dogs")["input_ids"][0]
    onset = read.onset if labels == "onset" else 0
    asked = len(read.judged_ids) - onset
    everywhere = Example(read.prompt_ids + read.judged_ids, [IGNORE] * (len(read.prompt_ids) + onset) + [sorry] * asked)
    assert 15 <= examples.count(everywhere) <= 45


def test_refusal_tokens_stand_before_every_answer(context, rows, tmp_path):
    reads, harmful, harmless = drawn(context, rows, refusing.refusal_tokens, tmp_path, 5)
    for one in harmful:
        start = len(reads[0].prompt_ids)
        assert one.ids[start] == one.targets[start] == 5 and one.targets[:start] == [IGNORE] * start
        tail = reads[0].judged_ids[reads[0].tokens :]
        assert one.ids[start + 1 :] in [
            [*context.tokenizer(text)["input_ids"], *tail] for text in ("dogs ran", "dogs ate")
        ]
    for one in harmless:
        assert one.ids == [*reads[1].prompt_ids, 6, *reads[1].judged_ids]


def test_a_long_prompt_is_cut_as_scoring_cuts_it_and_the_answer_stays():
    class BaselineContext:
        limit = 40

    BaselineContext.tokenizer, BaselineContext.spec = world("headers, trimmed")
    talk = [turn("system", "Be kind."), turn("user", "many words " * 30)]
    prompt = render_prompt(BaselineContext.tokenizer, talk, BaselineContext.spec)
    read = Read(Row([*talk, turn("assistant", "No")]), prompt, [], 0, None, False)
    example = refusing._example(BaselineContext, read, [5, 6, 7], 1)
    kept = fit_prompt(BaselineContext.tokenizer, talk, BaselineContext.spec, 37)
    assert example == Example([*kept, 5, 6, 7], [IGNORE] * (len(kept) + 1) + [6, 7])
    assert kept[0] == BaselineContext.tokenizer.bos_token_id and len(example.ids) <= 40
    long = refusing._example(BaselineContext, read, [*range(3, 103)])
    assert long.ids == [prompt[-1], *range(3, 42)]


def test_the_loss_is_that_of_a_loop_over_tokens():
    model = build("llama", 40, tied=False).double()
    batch = [
        Example([3, 4, 5, 6], [IGNORE, IGNORE, 5, 9]),
        Example([7, 8], [IGNORE, 2]),
        Example([1, 2, 3], [IGNORE] * 3),
    ]
    total, count = 0.0, 0
    for ids, targets in batch:
        logits = model(torch.tensor([ids])).logits[0]
        for i, target in enumerate(targets):
            if target != IGNORE:
                total, count = total - float(torch.log_softmax(logits[i - 1], 0)[target].detach()), count + 1
    assert count == 3 and float(loss_of(model, batch).detach()) == pytest.approx(total / 3, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_training_teaches_new_tokens_and_leaves_an_ordinary_model(tied, rank, tmp_path):
    model = build("llama", 40, tied)
    before = model.get_input_embeddings().weight.detach().clone()
    examples = [Example([3, 4, 39, 6 + i], [IGNORE, IGNORE, 39, 6 + i]) for i in range(8)]
    start = float(loss_of(model, examples).detach())
    tuning = Tuning(learning_rate=2e-2, passes=12, rows=4, lora_r=rank)
    trained = fine_tune(model, lambda number: examples, tuning, seed=0, new_rows=[39])
    assert float(loss_of(trained, examples).detach()) < 0.75 * start
    trained.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    after = trained.get_input_embeddings().weight.detach()
    assert not torch.equal(after[39], before[39])
    if rank:  # Other tokens' rows are as they were.
        assert torch.equal(after[:39], before[:39])


def test_a_trained_model_is_kept_and_not_trained_again(context, rows, tmp_path, monkeypatch):
    tuning = Tuning(rows=8)
    first = refusing.refusal_tokens(context, tmp_path / "model", tuning=tuning)
    first.fit(rows[:12])
    monkeypatch.setattr(refusing, "fine_tune", None)
    again = refusing.refusal_tokens(context, tmp_path / "model", tuning=tuning)
    again.fit(rows[:12])
    assert again.watched == first.watched
    assert again.score(rows[:3]).probs == pytest.approx(first.score(rows[:3]).probs, abs=1e-6)
    # It is an ordinary model's folder, which an attack can be run against.
    model, tokenizer = read_model(tmp_path / "model")
    assert model.config.vocab_size >= len(tokenizer)
    with pytest.raises(TypeError):
        refusing.refusal_tokens(context, tmp_path / "model", tuning=tuning).fit(rows[:11])


@pytest.mark.parametrize(("most", "kept"), [(None, 48), (100, 48), (12, 12)])
def test_thinning_keeps_order_and_shares(rows, most, kept):
    some = thinned(rows, most, 3)
    numbers = [int(row.id) for row in some]
    assert len(some) == kept and numbers == sorted(numbers)
    assert sum(row.harmful for row in some) * 3 == kept
    assert thinned(rows, most, 3) == some
