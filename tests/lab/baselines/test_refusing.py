"""What the refusal baselines are trained on, and the fine-tuning of those that `redflag train` cannot express."""

import pytest
import torch
from safetensors.torch import load_file
from templates import turn, world
from tiny import build

from redflag.backends.load import read_model
from redflag.data.rows import Row
from redflag.flags import FlagSpec
from redflag.lab.baselines import refusing, trained
from redflag.lab.baselines.shared import thinned
from redflag.lab.baselines.tuning import IGNORE, Tuning, fine_tune, hidden_of, language_loss, padded
from redflag.prompt import render_prompt
from redflag.truncation import fit_prompt

REFUSALS = ["dogs ran", "dogs ate"]


def drawn(context, rows, builder, tmp_path, times=60, **options):
    """The baseline, a harmful row, what becomes of it drawn many times, and a harmless row with what becomes of it."""
    baseline = builder(context, tmp_path, refusals=REFUSALS, **options)
    harmful = next(row for row in rows if row.harmful and row.onset)
    harmless = next(row for row in rows if not row.harmful)
    *made, anchor = baseline.rows_of([harmful] * times + [harmless])
    return baseline, harmful, made, harmless, anchor


def test_harmless_rows_are_the_anchor(context, rows, tmp_path):
    for builder in (refusing.refusal_tokens, refusing.deep_alignment, refusing.refusal_everywhere):
        baseline, _, _, harmless, anchor = drawn(context, rows, builder, tmp_path, 3)
        assert anchor == harmless
    (read,) = context.read([harmless])
    ids = read.prompt_ids + read.judged_ids
    labels = [IGNORE] * len(read.prompt_ids) + read.judged_ids
    assert baseline.example(anchor) == {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("builder", [refusing.deep_alignment, refusing.refusal_everywhere])
@pytest.mark.parametrize("labels", ["onset", "response"])
def test_deep_alignment_refuses_at_once_or_behind_harm(context, rows, tmp_path, labels, builder):
    _, harmful, made, _, _ = drawn(context, rows, builder, tmp_path, 120, labels=labels)
    made = [row for row in made if row.category is None]
    offsets = context.tokenizer(harmful.response, return_offsets_mapping=True)["offset_mapping"]
    ends = [end for _, end in offsets]
    least = next(end for end in ends if end > harmful.onset) if labels == "onset" else ends[0]
    counts = []
    for row in made:
        before, refusal = row.response[: row.prefill], row.response[row.prefill :]
        assert (
            refusal.startswith(" ")
            and refusal[1:] in REFUSALS
            and row.messages[:-1] == harmful.messages[:-1]
            and row.onset is None
        )
        assert harmful.response.startswith(before)
        counts.append(len(before))
    behind = [count for count in counts if count]
    assert len(made) / 4 <= len(behind) <= 3 * len(made) / 4
    assert set(behind) <= set(ends) and min(behind) >= least and max(behind) == len(harmful.response)
    assert len(set(behind)) > 3


@pytest.mark.parametrize("labels", ["onset", "response"])
def test_rto_asks_for_the_refusal_at_every_harmful_position(context, rows, tmp_path, labels):
    baseline, harmful, made, _, _ = drawn(context, rows, refusing.refusal_everywhere, tmp_path, labels=labels)
    (read,) = context.read([harmful])
    sorry = context.tokenizer("dogs")["input_ids"][0]
    onset = read.onset if labels == "onset" else 0
    asked = len(read.judged_ids) - onset
    ids = read.prompt_ids + read.judged_ids
    everywhere = {"input_ids": ids, "labels": [IGNORE] * (len(read.prompt_ids) + onset) + [sorry] * asked}
    examples = [baseline.example(row) for row in made]
    assert 15 <= examples.count(everywhere) <= 45
    for row, example in zip(made, examples, strict=True):
        if example != everywhere:  # a refusal, with nothing asked before it
            start = next(i for i, target in enumerate(example["labels"]) if target != IGNORE)
            assert example["labels"][start:] == example["input_ids"][start:]
            text = context.tokenizer.decode(example["input_ids"][start:], skip_special_tokens=True)
            assert text == row.response[row.prefill :].lstrip()
            assert example["labels"][start] == sorry


def test_a_refusal_token_stands_before_refusals_alone(context, rows, tmp_path):
    baseline, harmful, made, _, _ = drawn(context, rows, refusing.refusal_tokens, tmp_path, 20)
    assert {row.response for row in made} == set(REFUSALS)
    assert all(row.messages[:-1] == harmful.messages[:-1] and row.category and row.onset is None for row in made)
    assert (baseline.settings["placement"], baseline.settings["answers"]) == ("open", "all")


def test_the_probability_read_is_that_of_the_refusals_first_words(context, tmp_path):
    for builder in (refusing.deep_alignment, refusing.refusal_everywhere):
        watched = builder(context, tmp_path, refusals=REFUSALS).watched
        decoded = [context.tokenizer.decode([token]) for token in watched]
        assert decoded == ["do"]  # dogs are two tokens here


@pytest.mark.parametrize("builder", [refusing.deep_alignment, refusing.refusal_everywhere])
def test_the_step_before_anything_was_written_is_not_read(context, rows, tmp_path, builder):
    """There the request is refused, and a harmless answer to it looks no different yet."""
    baseline = builder(context, tmp_path / "model")
    baseline.fit(rows[:12])
    recording = baseline.score(rows[:3])
    for i in range(3):
        first, *others = recording.steps(i)[:, 0].tolist()
        assert first == 0.0 and all(p > 0 for p in others)


def test_a_long_prompt_is_cut_as_scoring_cuts_it_and_the_answer_stays(context, tmp_path):
    class Context:
        limit = 40

    Context.tokenizer, Context.spec = world("headers, trimmed")
    baseline = refusing.refusal_everywhere(context, tmp_path)
    baseline.context = Context
    talk = [turn("system", "Be kind."), turn("user", "many words " * 30)]
    prompt = render_prompt(Context.tokenizer, talk, Context.spec)
    example = baseline.example(Row([*talk, turn("assistant", "No, no")], prefill=3))
    start = next(i for i, target in enumerate(example["labels"]) if target != IGNORE)
    answer = len(Context.tokenizer("No, no", add_special_tokens=False)["input_ids"])
    kept = fit_prompt(Context.tokenizer, talk, Context.spec, 40 - len(example["input_ids"]) + len(prompt))
    assert example["input_ids"][0] == Context.tokenizer.bos_token_id and len(example["input_ids"]) <= 40
    assert example["labels"][start:] == example["input_ids"][start:] and answer and kept
    long = baseline.example(Row([*talk, turn("assistant", "No, no " * 40)], prefill=0))
    assert len(long["input_ids"]) == 40 and long["input_ids"][0] == prompt[-1]
    assert long["labels"] == [IGNORE, *long["input_ids"][1:]]


def test_the_loss_is_that_of_a_loop_over_tokens():
    model = build("llama", 40, tied=False).double()
    batch = [
        {"input_ids": [3, 4, 5, 6], "labels": [IGNORE, IGNORE, 5, 9]},
        {"input_ids": [7, 8], "labels": [IGNORE, 2]},
        {"input_ids": [1, 2, 3], "labels": [IGNORE] * 3},
    ]
    total, count = 0.0, 0
    for example in batch:
        logits = model(torch.tensor([example["input_ids"]])).logits[0]
        for i, target in enumerate(example["labels"]):
            if target != IGNORE:
                total, count = total - float(torch.log_softmax(logits[i - 1], 0)[target].detach()), count + 1
    assert count == 3 and loss_of(model, batch) == pytest.approx(total / 3, rel=1e-6)


def loss_of(model, examples):
    batch = padded(examples)
    return float(language_loss(model, hidden_of(model, batch), batch).detach())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_fine_tuning_learns_the_targets_and_leaves_an_ordinary_model(tied, rank, tmp_path):
    model = build("llama", 40, tied)
    model.get_output_embeddings().weight.data.mul_(4)  # what LoRA leaves as it is must be able to tell tokens apart
    before = model.get_input_embeddings().weight.detach().clone()
    examples = [{"input_ids": [3, 4, 39, 6 + i], "labels": [IGNORE, IGNORE, 39, 6 + i]} for i in range(8)]
    start = loss_of(model, examples)
    trained = fine_tune(model, examples, Tuning(learning_rate=2e-2, passes=12, rows=4, lora_r=rank), seed=0)
    assert loss_of(trained, examples) < 0.75 * start
    trained.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    after = trained.get_input_embeddings().weight.detach()
    assert torch.equal(after, before) == bool(rank)


@pytest.mark.parametrize("full", [True, False])
def test_training_teaches_a_new_token_and_leaves_an_ordinary_model(full, context, rows, tmp_path):
    settings = {"learning_rate": 1e-2, "num_train_epochs": 2, "full": full}
    refusing.refusal_tokens(context, tmp_path / "model", settings=settings).fit(rows)
    assert not (tmp_path / "model/adapter_config.json").exists()
    before, after = (
        load_file(path / "model.safetensors")["model.embed_tokens.weight"]
        for path in (context.base, tmp_path / "model")
    )
    changed = (after[: len(before)] != before).any(1).nonzero().flatten().tolist()
    assert after.shape == before.shape
    if full:
        assert len(changed) > 1
    else:  # other tokens' rows are as they were
        assert tuple(changed) == FlagSpec.load(tmp_path / "model").ids


@pytest.mark.parametrize("builder", [refusing.refusal_tokens, refusing.deep_alignment, refusing.refusal_everywhere])
def test_a_trained_model_is_kept_and_not_trained_again(context, rows, tmp_path, monkeypatch, builder):
    first = builder(context, tmp_path / "model")
    first.fit(rows[:12])
    monkeypatch.setattr(type(first), "_train", None)
    again = builder(context, tmp_path / "model")
    again.fit(rows[:12])
    assert again.score(rows[:3]).probs == pytest.approx(first.score(rows[:3]).probs, abs=1e-6)
    # It is an ordinary model's folder, which an attack can be run against.
    model, tokenizer = read_model(tmp_path / "model")
    assert model.config.vocab_size >= len(tokenizer)
    with pytest.raises(TypeError):
        builder(context, tmp_path / "model").fit(rows[:11])


@pytest.mark.parametrize("builder", [trained.fixed_position, refusing.deep_alignment, refusing.refusal_everywhere])
def test_several_processes_are_refused(context, rows, tmp_path, monkeypatch, builder):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match=r"must be trained by one process \(got 2\)"):
        builder(context, tmp_path / "model").fit(rows[:12])


@pytest.mark.parametrize(("most", "kept"), [(None, 48), (100, 48), (12, 12)])
def test_thinning_keeps_order_and_shares(rows, most, kept):
    some = thinned(rows, most, 3)
    numbers = [int(row.id) for row in some]
    assert len(some) == kept and numbers == sorted(numbers)
    assert sum(row.harmful for row in some) * 3 == kept
    assert thinned(rows, most, 3) == some
