"""The trainer: equal to a naive loop over whole logits, right under accumulation, moving only what should move."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny import build, make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from redflag.backends import Sampling
from redflag.backends.hf import HFBackend
from redflag.errors import RedflagError
from redflag.flags import FlagSpec, attach
from redflag.prompt import template_hash
from redflag.training.adapter import lora_config
from redflag.training.encode import encode, place
from redflag.training.trainer import RedFlagConfig, RedFlagTrainer


def settings(tmp_path, **changes):
    fixed = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        max_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        max_length=64,
        logging_steps=1,
        seed=5,
    )
    return RedFlagConfig(**{**fixed, **changes})


def naive_loss(model, reference, examples, config, spec):
    """Example by example, position by position, whole logits, the reference on the text without inserted flags."""
    flags = list(spec.ids)
    language = [v for v in range(model.get_input_embeddings().weight.shape[0]) if v not in flags]
    terms = {"harmful": [], "harmless": [], "keep": []}
    for example in examples:
        placed = place(example, config.placement_config(), spec, config.seed, 0)
        plain = [token for token, inserted in zip(placed.input_ids, placed.inserted, strict=True) if not inserted]
        z = model(input_ids=torch.tensor([placed.input_ids])).logits[0]
        with torch.no_grad():
            z_ref = reference(input_ids=torch.tensor([plain])).logits[0]
        for j in range(1, len(placed.input_ids)):
            if placed.flag_labels[j] >= 0:
                probabilities = z[j - 1].softmax(0)
                classes = torch.stack([probabilities[language].sum(), *(probabilities[f] for f in flags)])
                side = "harmful" if placed.flag_labels[j] else "harmless"
                terms[side].append(-classes[placed.flag_labels[j]].log())
            if placed.labels[j] != -100:
                before = j - 1 - sum(placed.inserted[:j])
                p = z_ref[before][language].softmax(0)
                q = z[j - 1][language].softmax(0)
                terms["keep"].append((p * (p.log() - q.log())).sum())
    means = {name: torch.stack(values).mean() if values else torch.zeros(()) for name, values in terms.items()}
    share = config.harmful_weight
    flag = share * means["harmful"] + (1 - share) * means["harmless"]
    return config.flag_coef * flag + config.keep_coef * means["keep"]


@pytest.mark.parametrize("placement", ["first", "insert", "dense"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_loss_and_gradients_equal_a_naive_loop(tmp_path, flagged, placement, full):
    model, tokenizer, spec, examples = flagged
    config = settings(
        tmp_path, placement=placement, insertions=2, in_context=0.5, harmful_weight=0.3, flag_coef=0.7, keep_coef=2.0
    )
    reference = copy.deepcopy(model).eval()
    trainer = RedFlagTrainer(
        model,
        config,
        spec,
        examples,
        processing_class=tokenizer,
        peft_config=None if full else lora_config(model, spec),
    )
    net = trainer.model
    torch.manual_seed(0)
    with torch.no_grad():  # away from the start, where the keep term and LoRA's B are zero
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    net.train()
    batch = trainer.data_collator(examples[:8])
    got = trainer.compute_loss(
        net, batch, num_items_in_batch=trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    )
    got.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    expected = naive_loss(net, reference, examples[:8], config, spec)
    expected.backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert gradients
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("placement", ["insert", "dense"])
def test_accumulated_micro_batches_train_like_one_big_batch(tmp_path, tokenizer, placement):
    finals = []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        model = build("llama", len(tokenizer))
        spec = attach(model, tokenizer, FlagSpec.of("harm"))
        examples = [encode(row, tokenizer, spec, 64, i) for i, row in enumerate(make_rows())]
        config = settings(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            placement=placement,
            optim="sgd",
            learning_rate=0.5,
        )
        torch.manual_seed(1)
        peft_config = lora_config(model, spec, 4)
        trainer = RedFlagTrainer(model, config, spec, examples, processing_class=tokenizer, peft_config=peft_config)
        trainer.train()
        finals.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for other in finals[1:]:
        for name, value in finals[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path, tokenizer):
    finals = []
    for checkpointing in (False, True):
        model = build("llama", len(tokenizer))
        spec = attach(model, tokenizer, FlagSpec.of("harm"))
        examples = [encode(row, tokenizer, spec, 64, i) for i, row in enumerate(make_rows())]
        config = settings(tmp_path, max_steps=3, activation_checkpointing=checkpointing, learning_rate=1e-2)
        torch.manual_seed(1)
        peft_config = lora_config(model, spec, 4)
        trainer = RedFlagTrainer(model, config, spec, examples, processing_class=tokenizer, peft_config=peft_config)
        trainer.train()
        finals.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_without_harmful_rows_still_trains(tmp_path, flagged):
    model, tokenizer, spec, examples = flagged
    harmless = [example for example in examples if not example["flag_class"]]
    trainer = RedFlagTrainer(
        model, settings(tmp_path), spec, harmless, processing_class=tokenizer, peft_config=lora_config(model, spec)
    )
    assert trainer.train().training_loss < 1.0


FAMILIES = [
    ("llama", True),
    ("llama", False),
    ("qwen3", True),
    ("qwen3", False),
    ("gemma3", True),
    ("mistral", True),
    ("mistral", False),
    ("phi3", True),
    ("phi3", False),
    ("moe", True),
    ("moe", False),
]


@pytest.mark.parametrize("family, tied", FAMILIES, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in FAMILIES])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_attach_train_save_load_stream(tmp_path, tokenizer, family, tied, full):
    model = build(family, len(tokenizer), tied)
    spec = attach(model, tokenizer, FlagSpec.of("harm", "theft"))
    spec = dataclasses.replace(spec, template_hash=template_hash(tokenizer))
    rows = make_rows()
    examples = [encode(row, tokenizer, spec, 64, i) for i, row in enumerate(rows)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = settings(tmp_path, placement="insert", learning_rate=1e-2, max_steps=2, router_aux_loss_coef=0.0)
    trainer = RedFlagTrainer(
        model, config, spec, examples, examples[:6], tokenizer, None if full else lora_config(model, spec, 4)
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p.detach(), start[n])}
    if full:
        assert any("embed_tokens" in name for name in moved) and any("mlp" in name for name in moved)
    else:
        assert all("lora_" in name or "trainable_tokens_delta" in name for name in moved)
        assert any("trainable_tokens_delta" in name for name in moved) and any("lora_B" in name for name in moved)
        merged = trainer.model.merge_and_unload()
        after = merged.state_dict()
        for name in before:
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                changed = (after[name] != before[name]).any(1).nonzero().flatten().tolist()
                assert set(changed) <= set(spec.ids) and changed, name
            elif "norm" in name:
                assert torch.equal(after[name], before[name]), name
        trainer.model = merged
    trainer.model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    spec.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[3, 40, 41, 1, 4]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    backend = HFBackend(loaded, AutoTokenizer.from_pretrained(tmp_path / "saved"), FlagSpec.load(tmp_path / "saved"))
    steps = list(backend.stream(ids[0].tolist(), Sampling(max_new_tokens=12, temperature=0)))
    assert steps and all(len(step.flag_probs) == 2 and step.token_id not in spec.ids for step in steps)


def test_the_flag_is_learnt_and_the_language_stays(tmp_path, flagged):
    model, tokenizer, spec, examples = flagged
    config = settings(
        tmp_path, max_steps=100, per_device_train_batch_size=24, learning_rate=2e-2, keep_coef=4.0, logging_steps=100
    )
    trainer = RedFlagTrainer(model, config, spec, examples, examples, tokenizer, lora_config(model, spec, 16))
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    print(first, last)
    assert last["eval_flag_loss"] < first["eval_flag_loss"] / 4
    assert last["eval_p_flag_harmful"] > 0.5 > 0.2 > last["eval_p_flag_harmless"]
    assert last["eval_auroc"] > 0.95 and last["eval_keep_kl"] < 0.1
    assert 0.9 < last["eval_perplexity_ratio"] < 1.1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"placement": "everywhere"}, r"placement must be .*got 'everywhere'"),
        ({"keep_coef": -1.0}, r"keep_coef must be .*got \-1\.0"),
        ({"harmful_weight": 1.5}, r"harmful_weight must be .*got 1\.5"),
        ({"insertions": 0}, r"insertions must be .*got 0"),
        ({"in_context": -0.1}, r"in_context must be .*got -0\.1"),
        ({"packing": True}, "packing"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(tmp_path, changes, words):
    with pytest.raises(RedflagError, match=words):
        settings(tmp_path, **changes)
