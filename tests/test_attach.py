"""Flags put into a model and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from redflag.errors import RedflagError
from redflag.flags import Flag, FlagSpec, attach

TEXTS = ["warning dangerous harm imminent under way", "How do I bake bread? Mix flour, water and salt."] * 3


TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def make_tokenizer(special: tuple[str, ...] = (), ordinary: tuple[str, ...] = (), template: str = TEMPLATE) -> Any:
    """Byte-level BPE; `special` and `ordinary` are tokens in the middle of the vocabulary, as models ship them."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|pad|>", *special, *ordinary],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(TEXTS, trainer)
    record = json.loads(rust.to_str())
    for token in record["added_tokens"]:
        if token["content"] in ordinary:
            token |= {"special": False, "normalized": True}
    rust = Tokenizer.from_str(json.dumps(record))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return tokenizer


def make_model(rows: int, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


class TestAttachOrder:
    @pytest.mark.parametrize(
        "special, ordinary, taken",
        [
            (("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"), (), "<|reserved_special_token_0|>"),
            ((), ("<unused0>", "<unused1>"), "<unused0>"),
            (("[control_8]", "[control_9]"), (), "[control_8]"),
            (("<SPECIAL_20>",), (), "<SPECIAL_20>"),
            (("[unused7]",), (), "[unused7]"),
            (("<|reserved_200000|>",), (), "<|reserved_200000|>"),
            (("<|dummy_0|>",), (), "<|dummy_0|>"),
            (("<|placeholder1|>",), (), "<|placeholder1|>"),
            (("<|extra_id_0|>",), (), "<|extra_id_0|>"),
            ((">>UNUSED_119<<",), (), ">>UNUSED_119<<"),
            (("<｜place▁holder▁no▁0｜>",), (), "<｜place▁holder▁no▁0｜>"),
            (("<|fim_prefix|>", "<|im_start|>"), ("<tool_call>",), None),
            ((), (), None),
        ],
    )
    def test_a_reserved_token_comes_first(self, special: Any, ordinary: Any, taken: str | None) -> None:
        tokenizer = make_tokenizer(special, ordinary)
        size, model = len(tokenizer), make_model(len(tokenizer))
        flag = attach(model, tokenizer, FlagSpec.of("harm")).flags[0]
        assert flag.token == (taken or "<|redflag_harm|>")
        assert flag.id == tokenizer.convert_tokens_to_ids(flag.token)
        assert len(tokenizer) == size + (taken is None)
        assert model.get_input_embeddings().weight.shape[0] == size + (taken is None)

    @pytest.mark.parametrize("special", [True, False])
    def test_the_text_of_a_flag_comes_apart_also_after_saving(self, special: bool, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(*((("<unused0>",), ()) if special else ((), ("<unused0>",))))
        index = tokenizer.convert_tokens_to_ids("<unused0>")
        spec = attach(make_model(len(tokenizer)), tokenizer, FlagSpec.of("harm"))
        assert spec.ids == (index,)
        tokenizer.save_pretrained(tmp_path)
        for used in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert used.convert_tokens_to_ids("<unused0>") == index
            assert index not in used("a<unused0>b", split_special_tokens=True)["input_ids"]
            assert index in used("a<unused0>b")["input_ids"]
            added = used.added_tokens_decoder[index]
            assert added.special and not added.normalized

    def test_a_reserved_token_that_the_template_uses_is_not_taken(self) -> None:
        tokenizer = make_tokenizer(
            ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
            template=TEMPLATE + "<|reserved_special_token_0|>",
        )
        spec = attach(make_model(len(tokenizer)), tokenizer, FlagSpec.of("harm"))
        assert spec.flags[0].token == "<|reserved_special_token_1|>"

    def test_nor_one_that_a_second_template_uses_or_that_has_a_role(self) -> None:
        tokenizer = make_tokenizer(tuple(f"<|reserved_{i}|>" for i in range(3)))
        tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "<|reserved_0|>"}
        tokenizer.pad_token = "<|reserved_1|>"
        spec = attach(make_model(len(tokenizer)), tokenizer, FlagSpec.of("harm"))
        assert spec.flags[0].token == "<|reserved_2|>"

    def test_nor_one_without_a_row_in_the_matrix(self) -> None:
        tokenizer = make_tokenizer()
        rows = len(tokenizer)
        tokenizer.add_tokens([AddedToken("<|reserved_0|>", special=True)])
        model = make_model(rows)
        spec = attach(model, tokenizer, FlagSpec.of("harm"))
        assert spec.flags[0].token == "<|redflag_harm|>"
        assert spec.ids[0] < model.get_input_embeddings().weight.shape[0]

    def test_nor_one_that_ordinary_text_makes(self) -> None:
        # A unigram model's own vocabulary holds the text, so that splitting special tokens makes it again.
        vocab = [("<unk>", 0.0), ("<extra_id_0>", 0.0), *((chr(i), -5.0) for i in range(32, 127))]
        rust = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
        rust.add_special_tokens(["<extra_id_0>"])
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>")
        spec = attach(make_model(len(tokenizer)), tokenizer, FlagSpec.of("harm"))
        assert spec.flags[0].token == "<|redflag_harm|>"

    def test_then_spare_rows_then_a_larger_matrix(self) -> None:
        tokenizer = make_tokenizer(("<|reserved_0|>",))
        size = len(tokenizer)
        model = make_model(size + 1)
        spec = attach(model, tokenizer, FlagSpec.of("weapons", "fraud", "theft"))
        assert [flag.token for flag in spec.flags] == ["<|reserved_0|>", "<|redflag_fraud|>", "<|redflag_theft|>"]
        assert spec.ids == (tokenizer.convert_tokens_to_ids("<|reserved_0|>"), size, size + 1)
        assert model.get_input_embeddings().weight.shape[0] == size + 2
        assert model.get_output_embeddings().weight.shape[0] == size + 2
        assert model.config.vocab_size == size + 2

    def test_spare_rows_leave_the_matrix_as_it_is(self) -> None:
        tokenizer = make_tokenizer()
        size = len(tokenizer)
        model = make_model(size + 20)
        spec = attach(model, tokenizer, FlagSpec.of("weapons", "fraud"))
        assert spec.ids == (size, size + 1)
        assert model.config.vocab_size == size + 20

    def test_a_flag_that_the_tokenizer_knows_keeps_its_id(self) -> None:
        tokenizer = make_tokenizer(("<|reserved_0|>", "<|reserved_1|>"), ("<|mine|>",))
        index = tokenizer.convert_tokens_to_ids("<|mine|>")
        spec = attach(
            make_model(len(tokenizer)),
            tokenizer,
            FlagSpec((Flag("a"), Flag("b", "<|mine|>"), Flag("c", "<|reserved_0|>"))),
        )
        assert [flag.token for flag in spec.flags] == ["<|reserved_1|>", "<|mine|>", "<|reserved_0|>"]
        assert spec.ids[1] == index

    def test_only_a_flag_with_an_id_keeps_its_trained_rows(self) -> None:
        tokenizer = make_tokenizer()
        model = make_model(len(tokenizer))
        spec = attach(model, tokenizer, FlagSpec.of("harm"))
        weight = model.get_input_embeddings().weight
        start = weight[spec.ids[0]].detach().clone()
        with torch.no_grad():
            weight[spec.ids[0]] = 7.0
        assert attach(model, tokenizer, spec) == spec
        assert (weight[spec.ids[0]] == 7.0).all()
        assert attach(model, tokenizer, FlagSpec.of("harm")) == spec
        torch.testing.assert_close(weight[spec.ids[0]].detach(), start)

    def test_nothing_but_the_flag_rows_changes(self) -> None:
        tokenizer = make_tokenizer(("<|reserved_0|>",))
        model = make_model(len(tokenizer))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        (index,) = attach(model, tokenizer, FlagSpec.of("harm")).ids
        for name, value in model.state_dict().items():
            rows = [i for i in range(len(value)) if i != index or ("embed" not in name and "lm_head" not in name)]
            assert torch.equal(value[rows], before[name][rows]), name

    def test_the_result_loads_with_stock_classes(self, tmp_path: Path) -> None:
        for tied in (False, True):
            tokenizer, model = make_tokenizer(), make_model(len(make_tokenizer()), tied)
            spec = attach(model, tokenizer, FlagSpec.of("harm"))
            model.save_pretrained(tmp_path)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
            assert loaded.config.vocab_size == spec.ids[0] + 1


class TestAttachRefusals:
    def test_a_slow_tokenizer(self) -> None:
        class Slow:
            is_fast = False

        with pytest.raises(RedflagError, match=r"the tokenizer must be a fast one \(got Slow\)"):
            attach(make_model(8), Slow(), FlagSpec.of("harm"))  # type: ignore[arg-type]

    @pytest.mark.parametrize("token", ["<|end|>", "<|pad|>", "<|user|>"])
    def test_a_token_with_a_purpose(self, token: str) -> None:
        tokenizer = make_tokenizer(("<|user|>",), template=TEMPLATE + "<|user|>")
        with pytest.raises(RedflagError, match="must not be used in the model's conversations"):
            attach(make_model(len(tokenizer)), tokenizer, FlagSpec((Flag("harm", token),)))

    def test_a_word_of_the_language(self) -> None:
        tokenizer = make_tokenizer()
        assert "ar" in tokenizer.get_vocab()
        with pytest.raises(RedflagError, match=r"must not arise from ordinary text in this tokenizer \(got 'ar'\)"):
            attach(make_model(len(tokenizer)), tokenizer, FlagSpec((Flag("harm", "ar"),)))

    def test_a_spec_of_another_model(self) -> None:
        tokenizer = make_tokenizer()
        with pytest.raises(RedflagError, match="has the id None in this tokenizer and 3 in the spec"):
            attach(make_model(len(tokenizer)), tokenizer, FlagSpec((Flag("harm", "<|x|>", id=3),)))


class TestFirstRows:
    @pytest.mark.parametrize("tied", [False, True])
    def test_the_input_row_is_the_mean_of_the_description(self, tied: bool) -> None:
        tokenizer = make_tokenizer()
        model = make_model(len(tokenizer), tied)
        old = model.get_input_embeddings().weight.detach().clone()
        spec = attach(model, tokenizer, FlagSpec((Flag("harm", description="dangerous harm"),)))
        words = tokenizer("dangerous harm")["input_ids"]
        row = model.get_input_embeddings().weight[spec.ids[0]].detach()
        torch.testing.assert_close(row, old[words].mean(0))
        assert (
            model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        ) == tied

    @pytest.mark.parametrize("spare", [0, 1, 50])
    @pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0, 300.0])
    @pytest.mark.parametrize("flags", [1, 3])
    def test_an_untied_flag_starts_below_one_in_v(self, spare: int, sharpness: float, flags: int) -> None:
        tokenizer = make_tokenizer(("<|reserved_0|>",))
        size = len(tokenizer)
        model = make_model(size + spare, seed=flags)
        with torch.no_grad():
            model.get_output_embeddings().weight.normal_(std=sharpness)
        spec = attach(model, tokenizer, FlagSpec.of(*(f"kind{i}" for i in range(flags))))
        with torch.no_grad():
            logits = model(torch.randint(0, size, (4, 32))).logits
        probs = logits.double().softmax(-1)[..., list(spec.ids)]
        assert probs.max() <= 1 / (size - 1) * (1 + 1e-4)

    def test_a_head_with_a_bias_starts_low_too(self) -> None:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        size = len(tokenizer)
        config = PhiConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = PhiForCausalLM(config).eval()
        with torch.no_grad():
            model.lm_head.bias.normal_(std=5.0)
            model.lm_head.weight.normal_(std=5.0)
        bias = model.lm_head.bias.detach().clone()
        (index,) = attach(model, tokenizer, FlagSpec.of("harm")).ids
        torch.testing.assert_close(model.lm_head.bias[index].detach(), bias.mean())
        with torch.no_grad():
            probs = model(torch.randint(0, size, (2, 16))).logits.double().softmax(-1)
        assert probs[..., index].max() <= 1 / size * (1 + 1e-4)

    @pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
    def test_a_tied_flag_starts_below_the_mean_of_its_description(self, sharpness: float) -> None:
        tokenizer = make_tokenizer()
        size = len(tokenizer)
        model = make_model(size, tied=True)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=sharpness)
        spec = attach(model, tokenizer, FlagSpec.of("harm"))
        words = tokenizer(spec.flags[0].description)["input_ids"]
        with torch.no_grad():
            probs = model(torch.randint(0, size, (4, 32))).logits.double().softmax(-1)
        assert (probs[..., spec.ids[0]] <= probs[..., words].mean(-1) * (1 + 1e-4) + 1e-12).all()

    def test_a_description_may_be_empty(self) -> None:
        tokenizer = make_tokenizer()
        model = make_model(len(tokenizer))
        (index,) = attach(model, tokenizer, FlagSpec((Flag("harm"),))).ids
        assert model.get_input_embeddings().weight[index].abs().sum() > 0
