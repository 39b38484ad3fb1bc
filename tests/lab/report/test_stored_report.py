"""A stored `report.json` is read back as what was written, or refused in one sentence."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from reports import make_report, read, set_at, write

from redflag.errors import RedflagError
from redflag.lab.report import read_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    write(make_report(), [], folder)
    return folder


def test_a_stored_report_is_read_as_what_was_written(folder, tmp_path):
    assert read_report(folder / "report.json") == read(make_report())
    with pytest.raises(RedflagError, match="cannot be read"):
        read_report(tmp_path / "nosuch.json")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", 2, "got 2 at format: Input should be 1"),
        ("title", None, "got null at title: Input should be a valid string"),
        ("methods", {}, "at least 1 item"),
        ("methods/redflag/kind", "probe", 'got "probe" at methods.redflag.kind'),
        ("methods/redflag/pooled", None, "got null at methods.redflag.pooled"),
        ("methods/redflag/pooled/auroc", 1.2, "got 1.2 at methods.redflag.pooled.auroc: Input should be less than"),
        ("methods/redflag/pooled/auroc", math.nan, "got NaN at methods.redflag.pooled.auroc"),
        ("methods/redflag/cost/note", math.inf, "got Infinity at methods.redflag.cost.note"),
        ("methods/redflag/pooled/auroc", True, "got true at methods.redflag.pooled.auroc"),
        ("methods/redflag/pooled/auroc_interval", [0.9, 0.8], "from low to high"),
        ("methods/redflag/pooled/nosuch", 1, "got 1 at methods.redflag.pooled.nosuch: Unexpected"),
        ("methods/redflag/monitor/nosuch", 1, "got 1 at methods.redflag.monitor.nosuch: Unexpected"),
        ("methods/redflag/threshold/target_fpr", 3, "target_fpr must be above 0 and below 1 under the guarantee"),
        ("methods/redflag/roc/tpr", [0.1], "methods.redflag.roc: Value error, tpr has 1 values for 3 points"),
        ("methods/redflag/delay/constructed/realised_fpr", None, "methods.redflag.delay.constructed.realised_fpr"),
        ("methods/redflag/delay/constructed/histogram/edges", [0, 1], "6 edges"),
        ("methods/redflag/earliness/k", "1", 'got "1" at methods.redflag.earliness.k: Input should be a valid array'),
        ("attacks/0/harm_produced", 0.5, "got 0.5 at attacks[0].harm_produced: Input should be an object"),
        ("attacks/1/name", None, "got null at attacks[1].name"),
        ("warnings", [3], "got 3 at warnings[0]: Input should be a valid string"),
    ],
)
def test_what_is_no_report_is_refused_in_one_sentence_with_its_place(tmp_path, path, value, said):
    (tmp_path / "report.json").write_text(json.dumps(set_at(make_report(), path, value)))
    with pytest.raises(RedflagError, match=re.escape(said)) as refused:
        read_report(tmp_path / "report.json")
    assert "\n" not in str(refused.value) and str(tmp_path / "report.json") in str(refused.value)
