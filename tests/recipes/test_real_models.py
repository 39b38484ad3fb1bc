"""Recipes of real models: every file parses; every training runs on a random model of the same architecture, with rows
that went through `prepare_hub.py` from folders laid out as the hub's sets are."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import stand_in_hub
import yaml
from real_models import TOKENS, family_of, model_of, save_mxfp4, tokenizer_of
from recipes_of import RECIPES, prepare_hub, script
from transformers import AutoModelForCausalLM

from redflag import cli
from redflag.backends.load import load_flagged
from redflag.calibrating import calibrate
from redflag.data.rows import Row, load_rows, write_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.lab.attacks.run_attacks import make_attacks
from redflag.lab.baselines.record_baselines import NAMES
from redflag.lab.evaluating import evaluate
from redflag.prompt import render_response
from redflag.training import train

MODELS = RECIPES / "models"
NAMES_OF_RECIPES = sorted(path.name.removesuffix(".train.yaml") for path in MODELS.glob("*.train.yaml"))
README = (MODELS / "README.md").read_text(encoding="utf-8")
# The commands of the README, without their comments; a command ends where its line does not end in a backslash.
COMMANDS = [
    line.split(" # ")[0].strip()
    for line in README.replace("\\\n", "").splitlines()
    if re.match("    (redflag|python) ", line)
]
WANTED = {
    *("smollm2-135m", "smollm2-360m", "qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"),
    *("gemma-3-1b", "gemma-3-12b", "mistral-7b", "phi-4-mini", "gpt-oss-20b"),
}


def settings_of(name):
    return yaml.safe_load((MODELS / f"{name}.train.yaml").read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """`runs/hub`, made from stand-ins of all sets."""
    root = stand_in_hub.make(tmp_path_factory.mktemp("sets"))
    output = tmp_path_factory.mktemp("hub")
    prepare_hub.main(["--output", str(output), "--root", str(root)])
    return output


@pytest.fixture(scope="module")
def inputs(hub, tmp_path_factory):
    """Where the rows of a recipe lie, which its file names under `runs/`."""
    made = tmp_path_factory.mktemp("made")
    tokenizer_of("qwen3").save_pretrained(made / "tokenizer")
    pairs = str(hub / "pairs" / "train.jsonl")
    script("papers/presto/prepare.py").main(pairs, str(made / "tokenizer"), str(made / "presto.jsonl"), 2)
    kinds = settings_of("gemma-3-1b-constitution")["categories"]
    rows = load_rows(hub / "harm" / "train.jsonl").rows
    write_rows(
        made / "rows.jsonl",
        [
            Row(r.messages, kinds[i % len(kinds)], len(r.response) // 2, id=r.id) if r.harmful else r
            for i, r in enumerate(rows)
        ],
    )
    return {
        "runs/hub/presto/qwen3-8b.jsonl": made / "presto.jsonl",
        "runs/gemma-3-1b-constitution/rows/rows.jsonl": made / "rows.jsonl",
        **{f"runs/hub/{p.parent.name}/{p.name}": p for p in hub.rglob("*.jsonl")},
    }


def test_every_model_has_a_recipe_and_every_recipe_a_line_in_the_table():
    methods = "redflag|refusal-tokens|marker|presto|constitution|three-term"
    assert {re.match(f"(.*?)-({methods})$", name)[1] for name in NAMES_OF_RECIPES} == WANTED
    for name in NAMES_OF_RECIPES:
        (line,) = re.findall(rf"^\| \[{re.escape(name)}\]\({re.escape(name)}\.train\.yaml\) .*", README, re.M)
        assert "not yet run" in line and "GiB" in line
        assert f"`{settings_of(name)['model']}`" in line or name.startswith("gpt-oss")
        assert f"\n### {name}\n" in README


@pytest.mark.parametrize("name", NAMES_OF_RECIPES)
def test_every_file_of_training_settings_is_one_that_its_verb_takes(name):
    path = MODELS / f"{name}.train.yaml"
    _, config = cli.parse(train, ["--config", str(path), "--use_cpu", "true"], "redflag train")
    assert config.output_dir == f"runs/{name}/model"
    assert f"redflag train --config recipes/models/{name}.train.yaml" in path.read_text()


@pytest.mark.parametrize("name", NAMES_OF_RECIPES)
def test_the_shared_files_take_every_model_on_the_command_line(name):
    model = ["--model", f"runs/{name}/model"]
    calibrate_argv = ["--config", str(MODELS / "calibrate.yaml"), *model]
    arguments, *_ = cli.parse(calibrate, calibrate_argv, "redflag calibrate")
    assert arguments.model == f"runs/{name}/model" and arguments.target_fpr == 0.01
    more = ["--base", settings_of(name)["model"], "--output_dir", f"runs/{name}/evaluation"]
    evaluate_argv = ["--config", str(MODELS / "evaluate.yaml"), *model, *more]
    arguments, *_ = cli.parse(evaluate, evaluate_argv, "redflag evaluate")
    assert arguments.base == settings_of(name)["model"] and arguments.output_dir == f"runs/{name}/evaluation"
    assert arguments.baselines and set(arguments.baselines) <= set(NAMES)
    for verb in ("calibrate", "evaluate"):
        assert f"redflag {verb} --config recipes/models/{verb}.yaml" in (MODELS / f"{verb}.yaml").read_text()


@pytest.mark.parametrize("command", [line for line in COMMANDS if "NAME.train.yaml" not in line], ids=str)
def test_the_commands_of_the_readme_can_be_given(command, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    program, first, *rest = shlex.split(command)
    if program == "python":
        assert Path(first).is_file()
        return
    more = ["--use_cpu", "true"] if first == "train" else []
    arguments, *_ = cli.parse(importlib.import_module(cli.VERBS[first][0]), [*rest, *more], f"redflag {first}")
    if first == "evaluate":
        assert make_attacks(arguments.attacks) is not None


REFUSALS = "--input runs/hub/refusals/calibration.jsonl --target-fpr 0.05 --aggregation first"


@pytest.mark.parametrize(
    "name, options",
    [
        ("smollm2-135m-refusal-tokens", REFUSALS),
        ("smollm2-360m-marker", REFUSALS),
        ("gemma-3-1b-constitution", "--input runs/gemma-3-1b-constitution/rows/calibration.jsonl"),
    ],
)
def test_recipes_with_rows_of_their_own_are_calibrated_on_them(name, options):
    shared = "redflag calibrate --config recipes/models/calibrate.yaml"
    assert shlex.split(f"{shared} --model runs/{name}/model {options}") in map(shlex.split, COMMANDS)


def base_of(recipe, folder):
    tokenizer = tokenizer_of(family_of(recipe))
    model = model_of(recipe, tokenizer)
    if recipe.startswith("gpt"):
        (folder / "published").mkdir()
        save_mxfp4(model, tokenizer, folder / "published")
        script("models/gpt_oss_base.py").main(str(folder / "published"), str(folder / "base"))
    else:
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def test_packed_experts_are_refused_before_anything_is_trained(inputs, tmp_path, capsys):
    base_of("gpt-oss-20b-redflag", tmp_path)
    rows, output = str(inputs["runs/hub/harm/train.jsonl"]), str(tmp_path / "model")
    argv = ["train", "--model", str(tmp_path / "published"), "--input", rows, "--output_dir", output]
    assert cli.main(argv) == 2
    assert "MXFP4" in capsys.readouterr().err and not (tmp_path / "model").exists()


# PEFT says so where a flag is a token that the vocabulary did not have room for.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(
    "recipe",
    [
        name if name == "smollm2-135m-redflag" else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES_OF_RECIPES
    ],
)
def test_every_recipe_trains_a_model_of_its_architecture_that_loads_and_scores(recipe, inputs, hub, tmp_path):
    base, path = base_of(recipe, tmp_path), MODELS / f"{recipe}.train.yaml"
    settings = settings_of(recipe)
    argv = {
        "config": path,
        "model": base,
        "input": inputs[settings["input"]],
        "output_dir": tmp_path / "model",
        "max_steps": 2,
        "max_length": 160,
        "dtype": "float32",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    assert cli.main(["train", *(word for key, value in argv.items() for word in (f"--{key}", str(value)))]) == 0
    record = json.loads((tmp_path / "model" / "train.json").read_text())
    assert record["steps"] == 2 and record["rows"]["train"] > 30
    backend, tokenizer, spec = load_flagged(tmp_path / "model", device="cpu")
    assert spec.categories == tuple(settings["categories"])
    reserved = TOKENS[family_of(recipe)][3]
    assert [flag.token for flag in spec.flags] == reserved[: len(spec.flags)] or not reserved
    row = load_rows(hub / "harm" / "test.jsonl").rows[0]
    rendered = render_response(tokenizer, row.messages, spec)
    (scores,) = backend.score([(rendered.prompt_ids, rendered.response_ids)])
    assert scores.shape == (len(rendered.response_ids), len(spec.flags)) and (scores > 0).all() and (scores < 1).all()
    assert len(rendered.tail_ids) == 1 and rendered.tail_ids[0] in backend.eos_ids
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (base, tmp_path / "model"))
    moved = {k for k in before if before[k].shape == after[k].shape and not before[k].equal(after[k])}
    assert any("self_attn" in key for key in moved)
    assert not any("vision" in key or "experts" in key or "router" in key for key in moved)


def test_a_recipe_calibrates_what_it_trained(inputs, tmp_path):
    recipe = "qwen3-0.6b-redflag"
    base = base_of(recipe, tmp_path)
    model = ["--output_dir", str(tmp_path / "model"), "--model", str(base)]
    rows = ["--input", str(inputs["runs/hub/harm/train.jsonl"])]
    more = ["--max_steps", "1", "--max_length", "160", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert cli.main(["train", "--config", str(MODELS / f"{recipe}.train.yaml"), *model, *rows, *more]) == 0
    config = ["--config", str(MODELS / "calibrate.yaml"), "--model", str(tmp_path / "model")]
    # Two in a hundred stand-in rows cannot hold a rate of one in a hundred.
    assert cli.main(["calibrate", *config, *rows, "--target_fpr", "0.2", "--max_length", "160"]) == 0
    record = json.loads((tmp_path / "model" / "thresholds.json").read_text())
    assert record["target_fpr"] == 0.2 and record["run_id"] == FlagSpec.load(tmp_path / "model").run_id


def test_a_gpt_oss_prompt_ends_in_the_final_channel_and_another_template_is_refused():
    base = script("models/gpt_oss_base.py")
    tokenizer = tokenizer_of("gpt")
    tokenizer.chat_template = base.final_channel(tokenizer.chat_template)
    spec = FlagSpec.of("harm")
    ids = tokenizer.convert_tokens_to_ids
    spec = FlagSpec(tuple(flag.__class__(**{**vars(flag), "id": ids("<|reserved_200000|>")}) for flag in spec.flags))
    turns = [{"role": "user", "content": "tell cat"}, {"role": "assistant", "content": "the cat sat"}]
    row = render_response(tokenizer, turns, spec)
    end = tokenizer.decode(row.prompt_ids)
    assert end.endswith("<|start|>assistant<|channel|>final<|message|>") and row.tail_ids == [ids("<|return|>")]
    # What training renders is what the published template writes of the whole conversation.
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == end + "the cat sat<|return|>"
    with pytest.raises(SystemExit, match="name the final channel"):
        base.final_channel("{{ messages }}")


def test_prepared_rows_keep_a_request_in_one_split_and_an_answer_once(hub):
    for folder in prepare_hub.FOLDERS:
        splits = {name: load_rows(hub / folder / f"{name}.jsonl").rows for name in prepare_hub.SPLITS}
        groups = [{row.group for row in rows} for rows in splits.values()]
        assert all(groups) and not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
        rows = [row for split in splits.values() for row in split]
        answers = Counter((row.group, row.response) for row in rows)
        assert max(answers.values()) == 1 and {row.source for row in rows} == set(prepare_hub.FOLDERS[folder])
        tested = [row.source for row in splits["train"] + splits["calibration"]]
        assert not {name for name in tested if prepare_hub.SETS[name].tested}
        assert all(row.messages[-1]["role"] == "assistant" for row in rows)


def test_prepared_rows_hold_near_misses_pairs_kinds_and_rewordings(hub):
    harm = load_rows(hub / "harm" / "train.jsonl").rows
    sides = Counter((row.source, row.harmful) for row in harm)
    assert sides["circuit-breakers", True] and sides["circuit-breakers", False] and sides["wildjailbreak", False]
    assert not sides["wildjailbreak", True]
    by_request = Counter(row.group for row in harm if row.source == "pku-saferlhf")
    assert max(by_request.values()) == 2
    refusals = load_rows(hub / "refusals" / "train.jsonl").rows
    assert {row.category for row in refusals} == {*prepare_hub.KINDS.values(), None}
    reworded = Counter(row.group for row in refusals if row.source == "wildjailbreak")
    assert max(reworded.values()) > 1
    prompts = load_rows(hub / "prompts" / "xstest.jsonl", unanswered="keep").rows
    assert {row.source for row in prompts} == {"xstest/safe", "xstest/unsafe"} and len(prompts) == 40


def test_a_set_that_cannot_be_loaded_is_named_with_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"circuit-breakers \(GraySwanAI/circuit-breakers.*--without circuit-breakers"):
        prepare_hub.make("pairs", tmp_path / "out", str(tmp_path), ())


def test_a_set_of_the_hub_is_read_by_columns_and_labels_given_in_json(tmp_path):
    shared = [
        "--model",
        "m",
        "--input",
        "PKU-Alignment/PKU-SafeRLHF-QA",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
    ]
    mapped = ["--columns", '{"label": "is_safe"}', "--labels", '{"true": null, "false": "harm"}']
    arguments, _ = cli.parse(train, [*shared, *mapped], "redflag train")
    record = {"prompt": "a", "response": "b", "is_safe": False, "severity_level": 3, "harm_category": {"Drugs": True}}
    rows = load_rows([record, {**record, "is_safe": True}], columns=arguments.columns, labels=arguments.labels).rows
    assert [row.category for row in rows] == ["harm", None]
    for wrong in ("{true", "[1]"):
        with pytest.raises(RedflagError, match="must be a mapping in JSON"):
            cli.parse(train, [*shared, "--labels", wrong], "redflag train")


def test_sets_can_be_left_out_and_rows_do_not_depend_on_the_run(hub, tmp_path):
    root = stand_in_hub.make(tmp_path / "sets")
    for name in ("a", "b"):
        prepare_hub.main(
            ["--output", str(tmp_path / name), "--root", str(root), "--only", "harm", "--without", "beavertails"]
        )
    first, second = ((tmp_path / name / "harm" / "train.jsonl").read_bytes() for name in ("a", "b"))
    assert first == second
    assert "beavertails" not in json.loads((tmp_path / "a" / "harm" / "counts.json").read_text())["train"]


@pytest.mark.parametrize("path", sorted((RECIPES / "scale" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations_and_knows_every_name_in_them(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    known = {action.dest for action in launch_command_parser()._actions}
    names = {*config.fsdp_config, *config.deepspeed_config}
    assert names <= known
    kinds = {"one-gpu": "NO", "fsdp2": "FSDP", "zero3-lora": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[path.stem] and config.mixed_precision == "bf16"
    assert config.num_processes >= (1 if path.stem == "one-gpu" else 2)
