"""The demo makes what it promises, skips what is done and makes anew what has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redflag.errors import RedflagError
from redflag.lab.nano import demo

STAGES = ["rows", "base model", "flags", "thresholds", "scores"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of seconds: what it measures is poor, what it does is the same."""
    monkeypatch.setattr(demo, "SHAPE", {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 48})
    monkeypatch.setattr(demo, "VOCABULARY", 600)
    monkeypatch.setattr(demo, "BASE_ROWS", 300)
    monkeypatch.setattr(demo, "BASE_TOKENS", 20_000)
    monkeypatch.setattr(demo, "ROWS", {"train": 200, "calibration": 200, "test": 200})
    monkeypatch.setattr(demo, "TARGET_FPR", 0.05)


def _made(arguments: demo.DemoArguments) -> tuple[list[str], dict[str, Any]]:
    said: list[str] = []
    result = demo.build(arguments, said.append)
    return [line[3:] for line in said if line.startswith("== ") and not line.endswith("before")], result


@pytest.mark.filterwarnings("ignore")
def test_a_demo_makes_its_files_skips_what_is_done_and_makes_anew_what_changed(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = demo.DemoArguments(output_dir=str(tmp_path / "nano"))
    stages, result = _made(arguments)
    assert stages == STAGES
    names = ["base/config.json", "model/redflag.json", "model/thresholds.json", "model/train.json"]
    names += ["rows/train.jsonl", "rows/calibration.jsonl", "rows/test.jsonl", "scored.jsonl", "results.json"]
    for name in names:
        assert (tmp_path / "nano" / name).exists(), name
    assert json.loads((tmp_path / "nano" / "results.json").read_text()) == json.loads(json.dumps(result))
    assert "AUROC of the response peak" in demo.table(result)

    again, same = _made(arguments)
    assert (again, same) == ([], result)

    (tmp_path / "nano" / "scored.jsonl").unlink()
    assert _made(arguments)[0] == ["scores"]
    monkeypatch.setattr(demo, "TARGET_FPR", 0.06)
    assert _made(arguments)[0] == ["thresholds", "scores"]

    capsys.readouterr()
    demo.streams(tmp_path / "nano", coloured=False, tries=3)
    shown = capsys.readouterr().out
    for wanted in ("halted", "completed"):
        assert f"for an answer that is {wanted}" in shown or f"of 3 answers was {wanted}" in shown


@pytest.mark.parametrize("setting", [{"size": 0}, {"size": 11}, {"color": "green"}])
def test_a_setting_that_cannot_be_used_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(RedflagError):
        demo.run(demo.DemoArguments(output_dir=str(tmp_path), **setting))
    assert not list(tmp_path.iterdir())
