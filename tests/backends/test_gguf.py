"""GGUF files as models: the numbers, the tokenizer, what every verb reads them by, and one sentence for what fails."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tiny import WORDS, build, make_rows
from tiny_gguf import write_gguf

from redflag import cli
from redflag.backends.load import load_flagged, read_model, read_tokenizer
from redflag.data.rows import write_rows
from redflag.errors import RedflagError
from redflag.models.pretrain import train_tokenizer
from redflag.weights.gguf import is_gguf
from redflag.weights.stamp import model_stamp

IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def words():
    return train_tokenizer([" ".join(WORDS)] * 5 + ["\n\n"] * 99, 320)


@pytest.mark.parametrize("tied", [True, False])
def test_the_numbers_are_those_of_the_model_that_was_written(tmp_path, words, tied):
    plain = build("llama", len(words), tied)
    file = write_gguf(tmp_path / "m.gguf", plain, words)
    model, tokenizer = read_model(file)
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-5)
    text = "the cat\n\n1. one <|x|> burn"
    assert tokenizer(text)["input_ids"] == words(text)["input_ids"]
    assert tokenizer.chat_template == words.chat_template and read_tokenizer(file)[1] == {words.eos_token_id}
    # Ordinary weights of an ordinary model: nothing says that they were quantised, and the folder is whole.
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in written and "_model_name_or_path" not in written
    again, _ = read_model(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_quantised_weights_are_read_in_full_and_in_the_type_that_is_asked_for(tmp_path, words):
    plain = build("llama", len(words))
    file = write_gguf(tmp_path / "M.GGUF", plain, words, bits8=True)
    model, _ = read_model(file, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    difference = model.float()(IDS).logits - plain(IDS).logits
    assert 0 < difference.abs().max() < 0.05


def test_no_other_tokenizer_is_taken_that_lies_beside_the_file(tmp_path, words):
    file = write_gguf(tmp_path / "m.gguf", build("llama", len(words)), words)
    train_tokenizer(["quite another text"] * 5, 300).save_pretrained(tmp_path)
    assert read_model(file)[1].get_vocab() == words.get_vocab()


def test_digits_are_split_as_the_file_says(tmp_path, words):
    model = build("llama", len(words))
    kinds = {
        split: write_gguf(tmp_path / f"{split}.gguf", model, words, split=split) for split in ("default", "smollm")
    }
    pieces = {split: read_model(file)[1].tokenize("a\n\n12") for split, file in kinds.items()}
    assert pieces["smollm"][-2:] == ["1", "2"] and pieces["smollm"][1:-2] == ["ĊĊ"]
    assert pieces["default"][1:3] == ["Ċ", "Ċ"]


@pytest.mark.parametrize("extra", [[], ["--merge", "false"], ["--full", "true"]])
def test_train_takes_it_and_leaves_an_ordinary_folder(tmp_path, words, extra, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "m.gguf", build("llama", len(words)), words, bits8=True)
    write_rows(tmp_path / "rows.jsonl", make_rows(48))
    options = ["--model", "m.gguf", "--input", "rows.jsonl", "--output_dir", "out", "--max_steps", "2", *extra]
    assert cli.main(["train", *options, "--use_cpu", "true", "--disable_tqdm", "true", "--max_length", "64"]) == 0
    adapter = tmp_path / "out" / "adapter_config.json"
    assert adapter.exists() == ("--merge" in extra)
    if adapter.exists():  # It is read again from the file that it was trained on.
        assert json.loads(adapter.read_text())["base_model_name_or_path"] == "m.gguf"
    else:
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    backend, _, spec = load_flagged(tmp_path / "out")
    assert backend.model.get_input_embeddings().weight.shape[0] > max(spec.ids)


def test_a_file_that_is_replaced_is_another_model_to_the_baselines(tmp_path, words):
    file = write_gguf(tmp_path / "m.gguf", build("llama", len(words)), words)
    first = model_stamp(file)
    write_gguf(file, build("llama", len(words)), words, bits8=True)
    assert model_stamp(file) != first


def test_what_cannot_be_read_is_one_sentence(tmp_path, words, monkeypatch):
    with pytest.raises(RedflagError, match=r"must be a GGUF file on this machine \(it does not exist\)"):
        read_model("owner/name/m.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no such thing")
    with pytest.raises(RedflagError, match=r"broken.gguf does not load as a model .* GGUF file of a kind"):
        read_model(broken)
    other = write_gguf(tmp_path / "other.gguf", build("llama", len(words)), words, architecture="grok")
    for read in (read_model, read_tokenizer):
        with pytest.raises(RedflagError, match=r"other.gguf does not load"):
            read(other)
    find = importlib.util.find_spec
    monkeypatch.setattr("redflag.weights.gguf.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(RedflagError, match=r"the package gguf must be installed .* pip install gguf"):
        read_model(other)


def test_names() -> None:
    assert is_gguf("a/B.GGUF") and not is_gguf("a/gguf")
