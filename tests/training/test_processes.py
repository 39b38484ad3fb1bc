"""Two processes train as one process that accumulates two micro-batches: the normalisers are of the whole batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny import build, make_rows
from torch.testing import assert_close

from redflag.data.rows import write_rows

TERMS = "--attention eager --consistency_coef 0.5 --answer_coef 0.5 --answers harmless --constraint_beta 0.1 "
TERMS += "--presto_coef 0.5 --benign_coef 0.5 --after_coef 0.5 --forecasts hold "
TERMS += "--adversarial_coef 0.5 --adversarial_steps 2 --adversarial_step_size 0.01"


@pytest.mark.parametrize(
    ("placement", "terms"),
    [pytest.param("insert", "", id="insert"), pytest.param("until", TERMS, id="every term")],
)
def test_two_processes_equal_one_that_accumulates(tmp_path, tokenizer, placement, terms):
    build("llama", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = make_rows(48)
    rows = [replace(row, prefill=6) if terms and i % 4 == 1 and not row.harmful else row for i, row in enumerate(rows)]
    rows = [replace(row, forecast=[[0, 0.3], [9, 0.8]]) if terms and i % 5 < 2 else row for i, row in enumerate(rows)]
    write_rows(tmp_path / "rows.jsonl", rows)
    common = f"--model {tmp_path}/base --input {tmp_path}/rows.jsonl --max_length 64 --max_steps 4 --logging_steps 1 "
    common += f"--per_device_train_batch_size 3 --placement {placement} --optim sgd --learning_rate 0.5 --use_cpu true "
    common += f"{terms} --save_strategy no --disable_tqdm true"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for output, launcher, extra in (
        ("two", [*torchrun, "-m", "redflag.cli"], ["--ddp_backend", "gloo"]),
        ("one", ["-m", "redflag.cli"], ["--gradient_accumulation_steps", "2"]),
    ):
        command = [sys.executable, *launcher, "train", *common.split(), "--output_dir", str(tmp_path / output), *extra]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "train.json").read_text()) for name in ("one", "two"))
    assert [log["loss"] for log in two["losses"]] == pytest.approx([log["loss"] for log in one["losses"]], rel=1e-4)
    for name in ("eval_keep_kl", "eval_flag_loss", "eval_auroc", "eval_perplexity_ratio"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3, abs=1e-6), name
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in first.items():
        assert_close(second[name], value, rtol=1e-3, atol=1e-5, msg=name)
