"""What would end a run after its last step is found before its first: one sentence, or repaired with a printed line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from real_models import tokenizer_of
from safetensors import safe_open
from tiny import SIZES, build, make_rows
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from redflag import cli
from redflag.backends import Sampling
from redflag.backends.load import load_flagged
from redflag.data.rows import write_rows
from redflag.errors import RedflagError
from redflag.training.preflight import refuse_quantised, repair_generation
from redflag.training.trainer import RedFlagTrainer


def train(folder: Path, output: str, **extra: object) -> int:
    fixed = {
        "model": folder / "base",
        "input": folder / "rows.jsonl",
        "output_dir": folder / output,
        "max_length": 96,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "dtype": "float32",
        "use_cpu": True,
        "disable_tqdm": True,
        **extra,
    }
    return cli.main(["train", *(word for key, value in fixed.items() for word in (f"--{key}", str(value)))])


@pytest.fixture
def world(tmp_path, tokenizer):
    """A base model and rows on disk."""
    build("llama", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", make_rows(48))
    return tmp_path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def never_trains(monkeypatch):
    monkeypatch.setattr(RedFlagTrainer, "train", lambda *a, **k: pytest.fail("training began"))


# As the file says -> as it is saved. vLLM and SGLang sample by the temperature, whatever `do_sample` says.
REPAIRS = {
    "greedy by name, sampling by numbers": (
        {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "sampling by numbers alone": ({"top_k": 20, "min_p": 0.1}, {"do_sample": True, "top_k": 20, "min_p": 0.1}),
    "temperature 0 stays greedy": (
        {"do_sample": False, "temperature": 0.0, "top_p": 0.9},
        {"do_sample": True, "temperature": None, "top_k": 1, "top_p": 0.9},
    ),
    "beam settings without beams": (
        {"num_beams": 1, "length_penalty": 0.5, "early_stopping": True},
        {"do_sample": None, "length_penalty": None, "early_stopping": None},
    ),
    "beam settings with beams": (
        {"num_beams": 4, "length_penalty": 0.5, "temperature": 0.6},
        {"do_sample": True, "length_penalty": 0.5},
    ),
    "padding by no token": ({"pad_token_id": -1}, {"pad_token_id": None, "do_sample": None}),
    "scores that nobody gets": ({"output_scores": True}, {"output_scores": None}),
    "nothing wrong": ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
}


@pytest.mark.parametrize("before, after", REPAIRS.values(), ids=REPAIRS)
def test_a_generation_configuration_that_contradicts_itself_is_repaired(before, after, tmp_path):
    model = build("llama", 32)
    (tmp_path / "generation_config.json").write_text(json.dumps(before))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    lines = repair_generation(model)
    assert {key: getattr(model.generation_config, key) for key in after} == after
    model.generation_config.validate(strict=True)
    changed = {key for key in {*before, *after} if getattr(model.generation_config, key) != before.get(key)}
    assert len(lines) == len(changed) and all(any(key in line for line in lines) for key in changed)


def test_a_generation_configuration_that_transformers_does_not_read_is_refused(world, capsys, monkeypatch):
    never_trains(monkeypatch)
    edit(world / "base" / "generation_config.json", num_return_sequences=3)
    assert train(world, "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("redflag train: ") and "num_return_sequences" in error


@pytest.mark.parametrize("extra", [{}, {"full": True, "save_strategy": "steps", "save_steps": 1}], ids=["lora", "full"])
def test_a_base_whose_generation_configuration_contradicts_itself_trains_and_loads(world, capsys, extra):
    edit(world / "base" / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
    assert train(world, "out", **extra) == 0
    assert "do_sample False -> True" in capsys.readouterr().out
    load_flagged(world / "out", None)
    saved = json.loads((world / "out" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)


QUANTISED = {
    "fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
    "quantised": {"compression_config": {"config_groups": {}, "format": "pack-quantized"}},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("merge", [True, False])
def test_quantised_weights_are_refused_before_anything_is_read(world, capsys, method, merge, monkeypatch):
    never_trains(monkeypatch)
    monkeypatch.setattr("redflag.training.train.read_model", lambda *a: pytest.fail("weights were read"))
    edit(world / "base" / "config.json", **QUANTISED[method])
    assert train(world, "out", merge=merge) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and f"got quant_method {method!r}" in error
    assert not (world / "out").exists()


def test_a_configuration_without_quantised_weights_is_not_refused(world):
    edit(world / "base" / "config.json", quantization_config=None)
    refuse_quantised(str(world / "base"))


def qwen3_5(folder: Path) -> None:
    """A multimodal Qwen3.5 in small: its wrapper around a text model with a linear and a full attention layer."""
    tokenizer = tokenizer_of("qwen3")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    text = {
        **SIZES,
        "vocab_size": len(tokenizer) + 8,
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_parameters": {**rope, "mrope_section": [1, 1, 0], "mrope_interleaved": True},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    marks = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = Qwen3_5Config(
        text_config=text,
        vision_config={**eye, "patch_size": 4, "num_position_embeddings": 16},
        tie_word_embeddings=True,
        **marks,
    )
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}')


def names_of(folder: Path) -> tuple[list[str], str, set[str]]:
    """What an engine goes by: architecture, kind of model, names of the weights."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        return config["architectures"], config["model_type"], set(file.keys())


def test_a_multimodal_model_is_saved_under_the_names_that_engines_look_for(tmp_path):
    qwen3_5(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", make_rows(48))
    assert train(tmp_path, "out") == 0
    base, saved = names_of(tmp_path / "base"), names_of(tmp_path / "out")
    assert base[0] == ["Qwen3_5ForConditionalGeneration"] and any("visual" in name for name in base[2])
    assert saved == base
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"patch_size": 4}'
    assert train(tmp_path, "adapter", merge=False) == 0
    measured = {}
    for name in ("out", "adapter"):
        backend, _, _ = load_flagged(tmp_path / name, None)
        # Twice, and a longer prompt in between: the wrapper keeps positions from one call to the next.
        for prompt in ([20, 30, 40], [20, 30, 40, 50, 60, 70, 80], [20, 30, 40]):
            steps = list(backend.stream(prompt, Sampling(max_new_tokens=6, temperature=0.0)))
            (scores,) = backend.score([(prompt, [step.token_id for step in steps])])
            assert [step.flag_probs[0] for step in steps] == pytest.approx(scores[:, 0], rel=1e-4)
        measured[name] = scores
    assert measured["adapter"] == pytest.approx(measured["out"], rel=1e-4)


def test_a_multimodal_model_of_which_only_the_text_part_loads_is_refused(tmp_path, capsys, monkeypatch):
    never_trains(monkeypatch)
    qwen3_5(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl", make_rows(48))
    edit(tmp_path / "base" / "config.json", architectures=["Qwen3_5ForCausalLM"])
    assert train(tmp_path, "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Engines would look for the weights" in error and "Qwen3_5ForCausalLM" in error


def test_a_tokenizer_that_does_not_read_back_as_it_was_is_refused_before_step_1(world, capsys, monkeypatch):
    never_trains(monkeypatch)
    real = PreTrainedTokenizerFast.save_pretrained

    def forgetful(self, folder, *args, **kwargs):
        result = real(self, folder, *args, **kwargs)
        (Path(folder) / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        return result

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", forgetful)
    assert train(world, "out") == 2
    assert "would not load from it" in capsys.readouterr().err
    assert [path.name for path in (world / "out").iterdir()] == []


def test_a_disk_that_is_too_small_for_the_result_is_found_before_step_1(world, capsys, monkeypatch):
    never_trains(monkeypatch)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("redflag.training.preflight.shutil.disk_usage", lambda path: usage)
    assert train(world, "out") == 2
    assert "must have room for the result" in capsys.readouterr().err


def test_what_evaluation_needs_is_tried_before_step_1(world, monkeypatch):
    never_trains(monkeypatch)

    def broken(*args, **kwargs):
        raise RedflagError("the evaluation cannot be")

    monkeypatch.setattr(RedFlagTrainer, "prediction_step", broken)
    assert train(world, "out") == 2
