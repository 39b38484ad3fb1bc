"""What ships: the adapter in 16 bits and what belongs to it; and adapters as ordinary models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_smollm2 import make_index, train_flag

from redflag.backends.load import load_flagged
from redflag.errors import RedflagError
from redflag.models import fetch, named, pack
from redflag.prompt import render_prompt


@pytest.fixture
def trained(tmp_path, monkeypatch):
    make_index(tmp_path, monkeypatch)
    folder = train_flag(tmp_path / "trained", fetch.fetch_smollm2(tmp_path / "base", log=lambda _: None))
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"large")
    return folder


def measured(folder):
    backend, tokenizer, spec = load_flagged(folder, None)
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "hello world"}], spec)
    (probs,) = backend.score([(prompt, tokenizer("one two three", add_special_tokens=False)["input_ids"])])
    return probs[:, 0].tolist()


def test_weights_in_16_bits_and_nothing_that_is_not_needed(trained, tmp_path):
    output = tmp_path / "shipped"
    output.mkdir()
    (output / "README.md").write_text("the card")
    assert pack.pack_flag(trained, output) == output
    names = {path.name for path in output.iterdir()}
    assert {"README.md", "redflag.json", "thresholds.json", "adapter_config.json", "train.json"} <= names
    assert not any("checkpoint" in name for name in names) and (output / "README.md").read_text() == "the card"
    assert {value.dtype for value in load_file(output / pack.WEIGHTS).values()} == {torch.float16}
    assert json.loads((output / "train.json").read_text())["losses"] == []
    named._point(output / "adapter_config.json", tmp_path / "base")
    assert measured(output) == pytest.approx(measured(trained), rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_of_a_merged_model_the_adapter_of_its_last_step_ships(trained, tmp_path):
    expected = load_file(pack.pack_flag(trained, tmp_path / "a") / pack.WEIGHTS)
    last = trained / "checkpoint-7"
    last.mkdir()
    weights = load_file(trained / pack.WEIGHTS)
    row = next(name for name in weights if name.endswith("trainable_tokens_delta"))
    # As the trainer's checkpoints are: the matrix below the row, and the tied head's row.
    weights[row.replace("trainable_tokens_delta", "base_layer.weight")] = torch.zeros(500, 8)
    weights["base_model.model.lm_head.token_adapter.trainable_tokens_delta"] = weights[row].clone()
    save_file(weights, last / pack.WEIGHTS)
    (trained / pack.WEIGHTS).unlink()
    (trained / "adapter_config.json").rename(last / "adapter_config.json")
    with pytest.raises(RedflagError, match=r"must hold an adapter .* no checkpoint-LAST"):
        pack.pack_flag(trained, tmp_path / "b")
    pack._rewrite(trained / "train.json", {"steps": 7})
    found = load_file(pack.pack_flag(trained, tmp_path / "b") / pack.WEIGHTS)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)


def test_a_merged_adapter_measures_the_same(trained, tmp_path):
    pack.merge_flag(trained, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert measured(tmp_path / "merged") == pytest.approx(measured(trained), rel=1e-4)
    with pytest.raises(RedflagError, match="must hold an adapter"):
        pack.merge_flag(tmp_path / "merged", tmp_path / "again")


def test_what_cannot_ship_is_refused_and_leaves_the_older_one(trained, tmp_path, monkeypatch):
    output = pack.pack_flag(trained, tmp_path / "shipped")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    monkeypatch.setattr(pack, "MOST", 100)
    with pytest.raises(RedflagError, match=r"must have at most 100 bytes \(got [\d,]+\)\. Train with a lower lora_r"):
        pack.pack_flag(trained, output)
    (trained / "thresholds.json").unlink()
    with pytest.raises(RedflagError, match=r"must hold thresholds.json \(it doesn't\)"):
        pack.pack_flag(trained, output)
    with pytest.raises(RedflagError, match="dtype must be one of bfloat16, float16"):
        pack.pack_flag(trained, output, "int8")
    with pytest.raises(RedflagError, match="must be new or a flag's folder"):
        pack.merge_flag(trained, tmp_path)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
