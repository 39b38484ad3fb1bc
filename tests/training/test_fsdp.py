"""FSDP2 on two processes gives what one process gives, and goes on after one of them was killed.

All goes through `accelerate launch` with the configuration that recipes name, on two gloo processes (`fsdp_worker.py`
says how).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from tiny import build, make_rows
from torch.testing import assert_close

from redflag.backends.load import load_flagged, read_model
from redflag.data.rows import write_rows
from redflag.errors import RedflagError
from redflag.training.sharded import check_plugin
from redflag.training.trainer import RedFlagConfig

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CONFIG = HERE.parent.parent / "recipes" / "scale" / "accelerate" / "fsdp2.yaml"
COMMON = "--max_length 64 --max_steps 4 --logging_steps 1 --per_device_train_batch_size 3 --disable_tqdm true "
COMMON += "--dtype float32 --bf16 false "
STEPS = "--save_strategy steps --save_steps 2 --optim adamw_torch --learning_rate 0.01"
SGD = "--save_strategy no --optim sgd --learning_rate 0.5"
TERMS = "--attention eager --consistency_coef 0.5 --answer_coef 0.5 --answers harmless --constraint_beta 0.1 "
TERMS += "--presto_coef 0.5 --benign_coef 0.5 --after_coef 0.5 "
TERMS += "--adversarial_coef 0.5 --adversarial_steps 2 --adversarial_step_size 0.01"
RUNS = {
    # Adapter off for the reference, flag rows in embedding and head, which are two units; killed and resumed.
    "lora": f"--model untied --placement insert {STEPS}",
    # One matrix for embedding and head, gradients over two batches, layers computed anew, the adapter saved as such.
    "tied": f"--model tied --placement dense {SGD} --merge false --activation_checkpointing true",
    # A frozen copy, gradients of the head's matrix, and every term: several passes before one backward pass.
    "full": f"--model untied --placement until --full true {SGD} {TERMS}",
}
BATCHES = {"lora": 1, "tied": 2, "full": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, words):
    """A folder with the runs of one process (`one-NAME`), of two (`two-NAME`), and how the killed one ended."""
    folder = tmp_path_factory.mktemp("fsdp")
    for name, family in (("untied", "llama"), ("tied", "gemma3")):
        build(family, len(words), tied=name == "tied").save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    rows = [replace(row, prefill=6) if i % 4 == 1 and not row.harmful else row for i, row in enumerate(make_rows(64))]
    write_rows(folder / "rows.jsonl", rows)
    alone = start(folder, "one", RUNS, [sys.executable])
    killed = start(folder, "two", ["lora"], launcher(), DIE_AT="3")
    dead = killed.communicate(timeout=600)[0]
    left = sorted(path.name for path in (folder / "two-lora").iterdir())
    efficient = ["--fsdp_cpu_ram_efficient_loading", "true"]
    both = start(folder, "two", RUNS, launcher(*efficient), resume="lora")
    for process in (alone, both):
        printed = process.communicate(timeout=600)[0]
        assert process.returncode == 0, printed[-5000:]
    return SimpleNamespace(folder=folder, status=killed.returncode, dead=dead, left=left)


def launcher(*options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), *options]
    return [*program, "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(port)]


def start(folder, kind, names, program, resume=None, **environment):
    commands = []
    for name in names:
        options = f"train --input rows.jsonl --output_dir {kind}-{name} {COMMON} {RUNS[name]}"
        options = options.replace("--model ", f"--model {folder}/").split()
        batches = BATCHES[name] * (2 if kind == "one" else 1)
        options += ["--gradient_accumulation_steps", str(batches)] + (["--resume"] if name == resume else [])
        commands.append(options + (["--use_cpu", "true"] if kind == "one" else []))
    file = folder / f"{kind}-{len(commands)}.json"
    file.write_text(json.dumps(commands))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    environment |= {} if kind == "one" else {"ACCELERATE_TORCH_DEVICE": "cpu"}
    command = [*program, str(HERE / "fsdp_worker.py"), file.name]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=folder, env=environment, **streams)


@pytest.mark.parametrize("name", RUNS)
def test_FSDP_on_two_processes_equals_one_process(runs, name):
    one, two = (json.loads((runs.folder / f"{kind}-{name}" / "train.json").read_text()) for kind in ("one", "two"))
    assert len(one["losses"]) == len(two["losses"]) == 4
    for expected, found in zip(one["losses"], two["losses"], strict=True):
        terms = sorted(set(expected) - {"epoch", "step", "num_tokens"})
        assert terms == sorted(set(found) - {"epoch", "step", "num_tokens"}) and len(terms) >= 6
        assert {t: found[t] for t in terms} == pytest.approx({t: expected[t] for t in terms}, rel=1e-4, abs=1e-6)
    for metric in ("eval_keep_kl", "eval_flag_loss", "eval_auroc", "eval_perplexity_ratio"):
        assert two["metrics"][metric] == pytest.approx(one["metrics"][metric], rel=1e-4, abs=1e-6), metric
    file = "model.safetensors" if name != "tied" else "adapter_model.safetensors"
    first, second = (load_file(runs.folder / f"{kind}-{name}" / file) for kind in ("one", "two"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert_close(second[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_FSDP_leaves_each_process_about_half_of_the_weights(runs, name):
    for process in (0, 1):
        found = json.loads((runs.folder / f"two-{name}-{process}.json").read_text())
        # Both layers, embedding and head, the whole.
        assert found["model"]["units"] >= 5 and 0.49 < found["model"]["own"] / found["model"]["all"] < 0.51
        assert (found["reference"] is None) == (name != "full")
        if name == "full":  # the reference's head stays whole between steps: some 30 % of so small a model
            assert found["reference"]["units"] >= 5 and found["reference"]["own"] / found["reference"]["all"] < 0.66
    alone = json.loads((runs.folder / f"one-{name}-0.json").read_text())
    assert alone["model"]["units"] == 0


def test_FSDP_run_that_lost_a_process_stops_and_resumes_from_its_checkpoint(runs):
    assert runs.status != 0 and "SIGKILL" in runs.dead
    assert "checkpoint-2" in runs.left and not {"redflag.json", "model.safetensors"} & set(runs.left)
    losses = json.loads((runs.folder / "two-lora" / "train.json").read_text())["losses"]
    assert [log["step"] for log in losses] == [1, 2, 3, 4]  # what came out of it is compared above


def test_FSDP_saves_folders_that_load_as_any_other(runs):
    for name in ("lora", "full"):
        _, _, spec = load_flagged(runs.folder / f"two-{name}", device=None)
        assert spec.run_id == json.loads((runs.folder / f"two-{name}" / "train.json").read_text())["run_id"]
        config = [(runs.folder / f"{kind}-{name}" / "config.json").read_text() for kind in ("one", "two")]
        assert config[0] == config[1]
    model, _ = read_model(runs.folder / "two-tied")
    assert model.get_output_embeddings().token_adapter.tied_adapter is not None


@pytest.mark.parametrize(
    ("options", "saves", "adapter", "match"),
    [
        pytest.param({"fsdp_version": 1}, True, False, "fsdp_version must be 2", id="FSDP1"),
        pytest.param({"state_dict_type": "SHARDED_STATE_DICT"}, True, True, "FULL_STATE_DICT", id="adapter in parts"),
        pytest.param({"state_dict_type": "SHARDED_STATE_DICT"}, True, False, None, id="weights in parts"),
        pytest.param({"state_dict_type": "SHARDED_STATE_DICT"}, False, True, None, id="no checkpoints"),
        pytest.param({"state_dict_type": "FULL_STATE_DICT"}, True, True, None, id="whole"),
    ],
)
def test_FSDP_in_ways_that_would_go_wrong_is_refused(options, saves, adapter, match):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **options})
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    if match is None:
        check_plugin(accelerator, saves, adapter)
        return
    with pytest.raises(RedflagError, match=match):
        check_plugin(accelerator, saves, adapter)


def test_deepspeed_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RedflagError, match=r"DeepSpeed is not supported.*FSDP2"):
        RedFlagConfig(output_dir=str(tmp_path))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    with pytest.raises(RedflagError, match="DeepSpeed is not supported"):
        RedFlagConfig(output_dir=str(tmp_path), deepspeed=str(tmp_path / "zero3.json"))
