"""Markers before refusals, refusal tokens, and the three-term objective: what the published recipes ask of places."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from terms import check_loss, moved_trainer, row, settings_of, split_log_probs, world
from tiny import TEXT, make_rows

from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.training.adapter import lora_config
from redflag.training.encode import IGNORE, Example, PlacementConfig, build_dataset, place
from redflag.training.trainer import RedFlagTrainer


def response(length, onset=0, flag_class=1, number=0):
    return Example(
        row=number, input_ids=list(range(50, 53 + length)), response_start=3, onset=onset, flag_class=flag_class
    )


@pytest.fixture
def one(tokenizer):
    return world(tokenizer, make_rows(2))[1]


@pytest.mark.parametrize(
    ("minimum", "maximum", "onset"), [(0, None, 0), (2, None, 0), (2, 5, 0), (3, 3, 0), (0, None, 4)]
)
def test_S1_1_until_asks_for_the_flag_from_k_to_a_uniform_i_and_inserts_it_there(one, minimum, maximum, onset):
    config = PlacementConfig("until", minimum_offset=minimum, maximum_offset=maximum)
    first = max(onset, minimum)
    places = range(first, 8 if maximum is None else maximum + 1)
    seen = Counter()
    for epoch in range(600):
        placed = place(response(8, onset), config, one, 0, epoch)
        (at,) = [j - 3 for j, inserted in enumerate(placed.inserted) if inserted]
        seen[at] += 1
        expected = [0] * onset + [IGNORE] * (first - onset) + [1] * (at - first + 1) + [IGNORE] * (8 - at)
        assert placed.flag_labels == [IGNORE] * 3 + expected and placed.input_ids[3 + at] == one.ids[0]
    assert set(seen) == set(places)
    share = 600 / len(places)
    assert all(abs(count - share) < 5 * share**0.5 for count in seen.values())


@pytest.mark.parametrize("placement", ["insert", "until"])
def test_S1_4_several_flags_stand_in_one_answer(one, placement):
    counts = {sum(place(response(9), PlacementConfig(placement, insertions=3), one, 0, e).inserted) for e in range(20)}
    assert counts == {3}
    assert sum(place(response(2), PlacementConfig(placement, insertions=3), one).inserted) == 2
    placed = place(response(9), PlacementConfig("until", insertions=3), one, 0, 1)
    last = max(j for j, inserted in enumerate(placed.inserted) if inserted)
    assert set(placed.flag_labels[3 : last + 1]) == {1} and set(placed.flag_labels[last + 1 :]) <= {IGNORE}


def test_S1_1_offsets_that_leave_no_position_are_refused():
    with pytest.raises(RedflagError, match="maximum_offset must be at least minimum_offset, 2"):
        PlacementConfig("until", minimum_offset=2, maximum_offset=1)


@pytest.mark.parametrize("insertions", [1, 2], ids=["S1_1", "S1_4"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_S1_1_S1_4_the_loss_is_the_three_term_objective(tmp_path, tokenizer, insertions, full):
    """Flag term, KL after an inserted flag, benign KL over the whole vocabulary to a reference that knows no flag."""
    rows = [row(f"tell {i}", TEXT[i : i + 28].strip(), "harm" if i % 2 else None) for i in range(6)]
    model, spec, data = world(tokenizer, rows)
    config = settings_of(
        tmp_path, placement="until", minimum_offset=1, insertions=insertions, flag_coef=0.6 + 0.3, harmful_weight=2 / 3,
        keep_coef=0.0, benign_coef=0.3, after_coef=0.8,
    )  # fmt: skip
    trainer, reference = moved_trainer(tokenizer, model, spec, data, config, full)
    examples = list(data)

    def expected(net):
        flag, after, benign = [], [], []
        for example in examples:
            placed = place(example, config.placement_config(), spec, config.seed, 0)
            plain = [token for token, inserted in zip(placed.input_ids, placed.inserted, strict=True) if not inserted]
            whole = net(input_ids=torch.tensor([placed.input_ids])).logits[0].log_softmax(-1)
            with torch.no_grad():
                z_ref = reference(input_ids=torch.tensor([plain])).logits[0]
                z_ref[:, list(spec.ids)] = -torch.inf
                p = z_ref.log_softmax(-1)
            places = [j for j, inserted in enumerate(placed.inserted) if inserted]
            for j in range(example["response_start"], len(placed.input_ids)):
                known = p[j - 1 - sum(placed.inserted[:j])]
                there = known > -torch.inf
                if not example["flag_class"]:
                    benign.append((known[there].exp() * (known[there] - whole[j - 1][there])).sum())
                    continue
                if example["response_start"] + 1 <= j <= max(places):
                    flag.append(-whole[j - 1, spec.ids[0]])
                if j > min(places):
                    language = split_log_probs(whole[j - 1], spec)[1]
                    # Where another flag stands the language next to it is kept as well.
                    after.append((known[there].exp() * (known[there] - language[there])).sum())
        return 0.6 * sum(flag) / len(flag) + 0.3 * sum(benign) / len(benign) + 0.8 * sum(after) / len(after)

    check_loss(trainer, examples, expected)


def refused(n, prompt, category):
    return [row(f"{prompt} {prompt} {prompt}", f"old dogs ran {i}", category, id=f"{prompt}{i}") for i in range(n)]


def first_position(trainer, spec, example):
    with torch.no_grad():
        ids = torch.tensor([example["input_ids"][: example["response_start"]]])
        return split_log_probs(trainer.model.eval()(input_ids=ids).logits[0, -1], spec)[0].exp()


def test_S0_1_S0_10_the_marker_comes_before_refusals_and_plain_ones_make_it_a_lower_bound(tmp_path, tokenizer):
    """Some refusals are learnt without marker: p(marker) says how many of them have one, and is less than all."""
    found = {}
    for share in (0.0, 0.4):
        rows = refused(12, "burn", "refusal") + refused(12, "cat", None)
        model, spec, _ = world(tokenizer, rows[:1], "refusal")
        data = build_dataset(rows, tokenizer, spec, 64, plain_share=share, seed=5)
        marked = sum(k > 0 for k in data["flag_class"]) / 12
        config = settings_of(
            tmp_path, placement="first", plain_share=share, learning_rate=2e-2, max_steps=50, keep_coef=1.0,
            per_device_train_batch_size=24, harmful_weight=marked / 2,
        )  # fmt: skip
        torch.manual_seed(0)
        adapter = lora_config(model, spec, 16)
        trainer = RedFlagTrainer(model, config, spec, data, processing_class=tokenizer, peft_config=adapter)
        trainer.train()
        p = [first_position(trainer, spec, data[i])[1].item() for i in (0, 12)]
        assert p[0] == pytest.approx(marked, abs=0.15) and p[1] < 0.1, (share, marked, p)
        found[share] = p[0]
    assert found[0.4] < found[0.0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_S0_10_plain_refusals_are_drawn_by_seed_and_id_alone(tokenizer, share):
    rows = refused(40, "burn", "refusal") + refused(5, "cat", None)
    _, spec, _ = world(tokenizer, rows[:1], "refusal")

    def plain(these, seed=5):
        data = build_dataset(these, tokenizer, spec, 64, plain_share=share, seed=seed)
        return {r.id for r, k in zip(these, data["flag_class"], strict=True) if r.harmful and k == 0}

    drawn = plain(rows)
    assert drawn == plain(rows[::-1]) and drawn >= plain(rows[:20])
    assert len(drawn) == pytest.approx(40 * share, abs=0 if share in (0, 1) else 10)
    if share == 0.3:
        assert drawn != plain(rows, seed=6)


def test_S2_1_category_tokens_stand_at_the_first_position_and_no_flag_means_respond(tmp_path, tokenizer):
    """Rows say which token: their category's, or none for answers and contrast rows; answers are learnt as in SFT."""
    kinds = {"burn": "safety", "rain": "unsupported", "cat": None, "barn": None}
    rows = [r for word, category in kinds.items() for r in refused(6, word, category)]
    model, spec, data = world(tokenizer, rows, "safety", "unsupported")
    assert isinstance(spec, FlagSpec) and len(set(spec.ids)) == 2
    config = settings_of(
        tmp_path, placement="first", answer_coef=1.0, answers="all", keep_coef=0.0, learning_rate=1e-2, max_steps=40,
        per_device_train_batch_size=24, logging_steps=1,
    )  # fmt: skip
    trainer = RedFlagTrainer(model, config, spec, data, processing_class=tokenizer)
    trainer.train()
    for example in data:
        classes = first_position(trainer, spec, example)
        assert classes.argmax().item() == example["flag_class"], (example["row"], classes)
    answers = [log["answer"] for log in trainer.state.log_history if "answer" in log]
    assert answers[-1] < answers[0] / 3


def test_S2_1_token_and_answer_are_the_likelihood_that_plain_fine_tuning_has(tmp_path, tokenizer):
    """-log p(token) - log p(answer | no flag): of one row, the loss times its tokens is that of [token, answer]."""
    model, spec, data = world(tokenizer, refused(1, "burn", "safety"), "safety", "unsupported")
    example = data[0]
    length = len(example["input_ids"]) - example["response_start"]
    config = settings_of(
        tmp_path, placement="first", answer_coef=float(length), answers="all", keep_coef=0.0, harmful_weight=1.0
    )
    trainer, _ = moved_trainer(tokenizer, model, spec, data, config, True)

    def expected(net):
        z = net(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        start = example["response_start"]
        loss = -z[start - 1].log_softmax(-1)[spec.ids[0]]
        for j in range(start, len(example["input_ids"])):
            loss = loss - split_log_probs(z[j - 1], spec)[1][example["input_ids"][j]]
        return loss

    check_loss(trainer, [example], expected)


def test_S2_1_with_the_token_in_the_text_the_answer_is_learnt_behind_it(tmp_path, tokenizer):
    """Placement open: -log p(token) - log p(answer | token), as for the text [token, answer]."""
    model, spec, data = world(tokenizer, refused(1, "burn", "unsupported"), "safety", "unsupported")
    example = data[0]
    start, flag = example["response_start"], spec.ids[1]
    length = len(example["input_ids"]) - start
    config = settings_of(
        tmp_path, placement="open", answer_coef=float(length), answers="all", keep_coef=0.0, harmful_weight=1.0
    )
    trainer, _ = moved_trainer(tokenizer, model, spec, data, config, True)
    text = [*example["input_ids"][:start], flag, *example["input_ids"][start:]]

    def expected(net):
        z = net(input_ids=torch.tensor([text])).logits[0]
        loss = -z[start - 1].log_softmax(-1)[flag]
        for j in range(start + 1, len(text)):
            loss = loss - split_log_probs(z[j - 1], spec)[1][text[j]]
        return loss

    check_loss(trainer, [example], expected)


@pytest.mark.parametrize("flag_class", [0, 1])
def test_S2_1_open_asks_at_the_first_position_alone_and_puts_the_flag_there(one, flag_class):
    placed = place(response(4, flag_class=flag_class), PlacementConfig("open"), one)
    added = [one.ids[0]] * flag_class
    assert placed.input_ids == [50, 51, 52, *added, 53, 54, 55, 56]
    assert placed.flag_labels == [IGNORE] * 3 + [flag_class] + [IGNORE] * (3 + flag_class)
    assert placed.labels == [IGNORE] * 3 + [*added, 53, 54, 55, 56]
    assert placed.inserted == [False] * 3 + [True] * flag_class + [False] * 4
