"""Device, weights' type and autocast, for machines of every kind."""

from __future__ import annotations

import pytest
import torch

from redflag.errors import RedflagError
from redflag.training.trainer import RedFlagConfig
from redflag.weights import precision
from redflag.weights.precision import Machine, Precision, choose_precision, inference_device, widest

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, AMX = Machine(), Machine(cpu_bf16=True)
OLD_GPU, GPU = Machine(cuda=True, cpu_bf16=True), Machine(cuda=True, cuda_bf16=True)
APPLE = Machine(mps=True)

# machine, stored type, options -> device, autocast, trained type, saved type
CASES = [
    (PLAIN, F32, {}, ("cpu", False, F32, F32)),
    (PLAIN, BF16, {}, ("cpu", False, F32, BF16)),
    (PLAIN, F16, {}, ("cpu", False, F32, F16)),
    (PLAIN, F32, {"bf16": True}, ("cpu", True, F32, F32)),
    (PLAIN, F32, {"dtype": "bfloat16"}, ("cpu", False, BF16, BF16)),
    (AMX, F32, {}, ("cpu", True, F32, F32)),
    (AMX, BF16, {}, ("cpu", True, BF16, BF16)),
    (AMX, F16, {}, ("cpu", True, F32, F16)),
    (AMX, F32, {"bf16": False}, ("cpu", False, F32, F32)),
    (AMX, F32, {"dtype": "bfloat16"}, ("cpu", True, BF16, BF16)),
    (AMX, BF16, {"dtype": "float32"}, ("cpu", True, F32, F32)),
    (GPU, F32, {}, ("cuda", True, F32, F32)),
    (GPU, BF16, {}, ("cuda", True, BF16, BF16)),
    (GPU, F32, {"fp16": True}, ("cuda", False, F32, F32)),
    (GPU, BF16, {"use_cpu": True}, ("cpu", False, F32, BF16)),
    (OLD_GPU, F32, {}, ("cuda", False, F32, F32)),
    (OLD_GPU, BF16, {}, ("cuda", False, F32, BF16)),
    (OLD_GPU, F32, {"use_cpu": True}, ("cpu", True, F32, F32)),
    (APPLE, F32, {}, ("mps", False, F32, F32)),
    (APPLE, BF16, {}, ("mps", False, F32, BF16)),
    (APPLE, F32, {"use_cpu": True}, ("cpu", False, F32, F32)),
]


@pytest.mark.parametrize(("machine", "stored", "options", "expected"), CASES)
def test_precision_follows_the_machine_and_explicit_options_win(machine, stored, options, expected):
    assert choose_precision(machine, stored, **options) == Precision(*expected)


@pytest.mark.parametrize(
    ("machine", "options", "message"),
    [
        (PLAIN, {"dtype": "int8"}, "dtype must be auto, float32, bfloat16, float16 (got 'int8')"),
        (PLAIN, {"fp16": True}, "fp16 must be false on a CPU"),
        (GPU, {"fp16": True, "use_cpu": True}, "fp16 must be false on a CPU"),
        (OLD_GPU, {"bf16": True}, "bf16 must be false on this GPU"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_in_words(machine, options, message):
    with pytest.raises(RedflagError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
        choose_precision(machine, **options)


@pytest.mark.parametrize("forced", ["on", "off"])
def test_the_environment_forces_either_kind_of_processor(monkeypatch, forced):
    monkeypatch.setenv("REDFLAG_BF16", forced)
    assert Machine.here().cpu_bf16 is Machine.here().cuda_bf16 is (forced == "on")
    monkeypatch.setenv("REDFLAG_BF16", "yes")
    with pytest.raises(RedflagError, match=r"REDFLAG_BF16 must be on or off \(got 'yes'\)"):
        Machine.here()


@pytest.mark.parametrize(("cpu", "expected"), [(True, True), (False, False)])
def test_without_the_environment_the_processor_is_asked(monkeypatch, cpu, expected):
    monkeypatch.delenv("REDFLAG_BF16", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert Machine.here().cpu_bf16 is expected
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert Machine.here().cpu_bf16 is False


@pytest.mark.parametrize(
    ("forced", "options"), [("on", {}), ("off", {}), ("on", {"bf16": False}), ("off", {"bf16": True})]
)
def test_training_is_configured_on_a_cpu_of_either_kind(monkeypatch, tmp_path, forced, options):
    monkeypatch.setenv("REDFLAG_BF16", forced)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = RedFlagConfig(output_dir=str(tmp_path), report_to="none", **options)
    assert config.bf16 is options.get("bf16", forced == "on")
    assert config.device.type == "cpu"


def test_a_model_that_nobody_placed_runs_on_a_gpu_or_the_cpu(monkeypatch):
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert inference_device() == expected


def test_double_precision_is_not_used_on_apples_gpu(monkeypatch):
    assert widest("cpu") == widest("cuda:1") == torch.float64
    assert widest("mps") == torch.float32
    monkeypatch.setattr(precision, "NARROW_DEVICES", {"cpu"})
    assert widest(torch.device("cpu")) == torch.float32
