"""Promises of the report: three files that say the same, nothing invented, nothing that data could break."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import HOSTILE, bare_report, make_report, make_traces, read, set_at, trace, write

from redflag.errors import RedflagError
from redflag.lab import report as reporting
from redflag.lab.report import require
from redflag.lab.report.method import FittedThresholds, Method, Slice
from redflag.lab.report.viewer_data import ShownResponse, pack

Tables = list[list[list[str]]]


class _Tables(HTMLParser):
    """The tables of a page, cell by cell; what a cell says quietly comes after its text in brackets."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: Tables = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts = 0
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.scripts += tag == "script"
        self.attributes |= {name for name, _ in attrs}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._inside = "cell"
        elif tag == "small" and self._inside:
            self.tables[-1][-1][-1] += " ("
            self._inside = "small"

    def handle_endtag(self, tag: str) -> None:
        if tag == "small" and self._inside == "small":
            self.tables[-1][-1][-1] += ")"
            self._inside = "cell"
        elif tag in ("td", "th"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data


def _of_page(path: Path) -> Tables:
    reader = _Tables()
    reader.feed(path.read_text(encoding="utf-8"))
    return [[[" ".join(cell.split()) for cell in row] for row in table] for table in reader.tables]


def _of_markdown(path: Path) -> Tables:
    tables: Tables = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
            inside = True
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not all(re.fullmatch(r"-+:?", cell) for cell in cells):
            plain = [re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)\*", "", cell)) for cell in cells]
            tables[-1].append(plain)
    return tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(make_report(), make_traces(), folder)
    return folder


def _filled(found: Any, given: Any) -> Any:
    """What is given, with null for all that is not."""
    if isinstance(given, dict):
        assert set(given) <= set(found)
        return {key: _filled(found[key], given[key]) if key in given else None for key in found}
    return [_filled(*pair) for pair in zip(found, given, strict=True)] if isinstance(given, list) else given


def test_json_is_what_was_measured_and_null_for_what_was_not(folder):
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    notes = [method.pop("notes") for method in found["methods"].values()]
    assert found == _filled(found, make_report()) and notes == [[], [], []]


def test_page_and_markdown_have_the_same_tables(folder):
    page, markdown = _of_page(folder / "report.html"), _of_markdown(folder / "report.md")
    # The page puts folded tables after the charts, so the order differs, and marks stand before the quiet part.
    spelled = [sorted(sorted(re.findall(r"[\w.,%+−-]+", cell)) for row in table for cell in row) for table in page]
    told = [sorted(sorted(re.findall(r"[\w.,%+−-]+", cell)) for row in table for cell in row) for table in markdown]
    assert sorted(spelled) == sorted(told)
    assert len(page) > 12


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        ("redflag", ["91.2% (86.2–95.2)", "97.5% (95.0–99.0)", "0.9871 (0.9812–0.9923)", "not measured"]),
        ("TF-IDF", ["70.1% (65.1–74.1)", "not measured"]),
        ("redflag", ["0.5", "1.0% (expected)", "1.2% (0.51–2.34)", "86.4% (81.1–90.1)", "1,234 (calibration)"]),
        ("redflag", ["120", "12.5%", "62.5%", "15.0%", "10.0%", "+1 (0 to +2)", "1.5", "1.2%"]),
        ("redflag", ["2.2 (none in 50.0%)", "0.8 (none in 80.0%)", "0.5 (none in 90.0%)", "0.0 (none in 100%)"]),
        ("redflag", ["0.512 (0.450–0.570)", "0.734 (0.700–0.770)", "0.981 (0.970–0.990)"]),
        ("redflag", ["0.0456", "not measured", "response peak against harmful"]),
        ("plain", ["200", "1,000", "88.7% (83.7–92.7)", "not measured"]),
        ("rare few rows", ["7", "64.3% (59.3–68.3)"]),
        ("xstest", ["250", "1.6% (0.44–4.05)"]),
        (
            "prefill, 20 tokens",
            ["77.5% (61.6–89.2)", "5.0% (0.6–16.9)", "31.2", "1.1", "90.0%", "0.991 (0.420–0.999)", "2"],
        ),
        ("gcg adaptive", ["30.0%", "not measured"]),
        ("redflag", ["flag", "1.5", "2.05 k", "max", "The flag's probability. one core"]),
        ("redflag", ["91.2% (86.2–95.2)", "86.4% (81.1–90.1)", "1.2% (0.51–2.34)", "+0.05%", "+3.1%"]),
        ("TF-IDF", ["70.1% (65.1–74.1)", "+0.0047%", "not measured"]),
        ("TF-IDF then redflag", ["68.8% (63.8–72.8)", "+1.23%", "+5%", "5.1% (4.0–6.5)"]),
        ("command", ["redflag evaluate --seed 0"]),
        ("seeds", ["0, 1"]),
        ("rows train", ["not measured"]),
    ],
)
def test_the_page_says_the_numbers(folder, row, cells):
    found = [line for table in _of_page(folder / "report.html") for line in table if line and line[0] == row]
    assert any(all(cell in line for cell in cells) for line in found), found


def test_thresholds_of_several_flags_are_named(tmp_path):
    report = make_report(("theft", "fraud"))
    report["methods"]["redflag"]["threshold"]["values"]["fraud"] = 0.25
    write(report, [], tmp_path)
    assert "theft 0.5; fraud 0.25" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_parts_without_harmless_rows_are_judged_at_the_threshold_in_force(tmp_path):
    report = make_report()
    parts = report["methods"]["redflag"]["slices"]["source"]
    for one in parts.values():
        one |= {"tpr": {}, "against": "harmless rows of the same source"}
        one["in_force"] = {"tpr": 0.777, "tpr_interval": [0.7, 0.8], "realised_fpr": None}
    write(report, [], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "redflag in force" in text and text.count("77.7% (70.0–80.0)") == 2
    assert "Caught at the threshold in force;" in text


@pytest.mark.parametrize(
    ("edges", "bins"),
    [
        ([None, -2, 0, 1, 3, None], ["≤ −3", "−2 to −1", "0", "1 to 2", "≥ 3", "missed"]),
        ([-4.5, -2.5, -1.5, -0.5, 0.5, 2.5], ["−4 to −3", "−2", "−1", "0", "1 to 2", "missed"]),
    ],
)
def test_bins_are_named_by_their_whole_tokens(tmp_path, edges, bins):
    report = make_report()
    report["methods"]["redflag"]["delay"]["constructed"]["histogram"] = {"edges": edges, "counts": [1] * 5, "missed": 1}
    report = set_at(report, "methods/redflag/delay/constructed/histogram/counts", [1] * (len(edges) - 1))
    write(report, [], tmp_path)
    table = next(t for t in _of_markdown(tmp_path / "report.md") if t[0][0] == "tokens after the onset")
    assert [row[0] for row in table[1:]] == bins


def test_what_was_not_measured_is_not_in_the_verdict(folder, tmp_path):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "catches 86.4% (81.1–90.1) of harmful responses and alarms on 1.2% (0.51–2.34) of harmless ones" in text
    assert "the median alarm comes 1 token after it (62.5% on time, 10.0% missed; false alarms 1.2%)" in text
    assert "the best of 1 baseline, TF-IDF, 70.1% (65.1–74.1): redflag is ahead" in text
    assert "prefill (20 tokens), does so in 5.0% (0.6–16.9) of 40 requests; without the guard it is 77.5%" in text
    write(bare_report(), [], tmp_path)
    bare = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "How much redflag catches was not measured (3 harmful and 3 harmless responses)." in bare
    assert "ahead" not in bare and "attack" not in bare and "0.0%" not in bare


def test_a_target_that_is_not_kept_is_said_first(tmp_path):
    report = make_report()
    for low, said in ((0.0101, True), (0.01, False)):
        report["methods"]["redflag"]["in_force"]["realised_fpr_interval"] = [low, 0.0234]
        write(report, [], tmp_path)
        text = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert ("That is more than the target of 1.0%" in text) is said


def test_plain_requests_are_no_attack(tmp_path):
    report = make_report()
    report["attacks"][0]["name"] = "none"
    write(report, [], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "No attack gets more harm past the guard than plain requests do, in 5.0% (0.6–16.9) of 40 requests" in text
    assert "| no attack, 20 tokens |" in text


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [(0.912, 0.9, "does not tell them apart"), (0.6, 0.9, "redflag is behind"), (0.9, 0.6, "redflag is ahead")],
)
def test_a_baseline_that_wins_is_said_to_win(tmp_path, ours, theirs, said):
    report = make_report()
    for name, value in (("redflag", ours), ("TF-IDF", theirs)):
        point = report["methods"][name]["pooled"]["tpr"]["0.01"]
        point |= {"tpr": value, "interval": [value - 0.03, value + 0.03]}
    write(report, [], tmp_path)
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_every_null_part_is_written_as_not_measured(tmp_path):
    report = make_report()
    flag = report["methods"]["redflag"]
    for key in ("cost", "slices", "roc", "threshold", "in_force", "delay", "earliness", "reliability", "over_refusal"):
        flag[key] = None
    report |= {"attacks": [], "judge": None, "made": None, "warnings": None}
    write(report, [], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "not measured" in text and "Under attack" not in text and "None" not in text and "nan" not in text.lower()
    assert 'id="trace-data"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("probs", [[0.5], [math.nan], [0.1]], "'bad' must have probabilities from 0 to 1 (got nan)"),
        ("probs", [[0.5], [1.5], [0.1]], "'bad' must have probabilities from 0 to 1 (got 1.5)"),
        ("probs", [[0.5]], "'bad' must have a row of flag probabilities for each of its 2 tokens (got a table of"),
        ("probs", [0.5, 0.1, 0.1], "for each of its 2 tokens (got a table of shape (3,))"),
        ("probs", [[0.1, 0.2]] * 3, "as many flags (got 1, 2)"),
    ],
)
def test_a_response_that_cannot_be_shown_is_refused(tmp_path, key, value, said):
    traces = [trace("good", [0.1, 0.2, 0.3]), {**trace("bad", [0.1, 0.2, 0.3]), key: value}]
    with pytest.raises(RedflagError, match=re.escape(said)):
        write(bare_report(), traces, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_hostile_text_is_text_everywhere(tmp_path):
    report = make_report()
    report |= {"title": HOSTILE, "warnings": [HOSTILE], "made": {HOSTILE: HOSTILE}}
    report["methods"][HOSTILE] = report["methods"].pop("TF-IDF")
    report["methods"]["redflag"]["slices"] = {"source": {HOSTILE: report["methods"]["redflag"]["pooled"]}}
    write(report, [trace(HOSTILE, [0.1, 0.2], tokens=[HOSTILE], source=HOSTILE, given=HOSTILE)], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = _Tables()
    reader.feed(page)
    assert "img" not in reader.tags and not any(name.startswith("on") for name in reader.attributes)
    # Scripts: the charts' data, the responses, Vega, and the page's own.
    assert reader.scripts == 9
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<", markdown)


def test_surrogates_and_line_separators_survive(tmp_path):
    odd = "a\ud800b\u2028c\x00d\U0001f600"
    write(bare_report(), [trace("odd", [0.1, 0.2], tokens=[odd])], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.search(r'id="trace-data">(.*?)</script>', page)
    assert found
    assert json.loads(found[1])["vocabulary"] == [odd]


def test_probabilities_travel_bit_by_bit():
    values = np.random.default_rng(0).random((7, 2), dtype=np.float32)
    traces = [
        ShownResponse(["a", "b"], values[:3].tolist(), True),
        ShownResponse(["b", "c", "a"], values[3:], False),
        ShownResponse([], [], False),
    ]
    method = Method("flag", Slice(1, 2), threshold=FittedThresholds({"x": 0.5, "y": 0.25}))
    import base64

    packed = pack(traces, method)
    assert np.array_equal(np.frombuffer(base64.b64decode(packed["probs"]), "<f4").reshape(-1, 2), values)
    assert np.frombuffer(base64.b64decode(packed["tokens"]), "<u2").tolist() == [0, 1, 1, 2, 0]
    assert packed["flags"] == ["x", "y"] and packed["thresholds"] == [0.5, 0.25]
    assert packed["rows"]["steps"] == [3, 4, 0] and packed["rows"]["tokens"] == [2, 3, 0]
    # Thresholds of other flags than those recorded are not taken for theirs.
    other = replace(method, threshold=FittedThresholds({"x": 0.5}))
    assert pack(traces, other)["thresholds"] is None


@settings(max_examples=40)
@given(st.data())
def test_whatever_is_null_a_report_is_refused_or_written_without_it(tmp_path_factory, data):
    report = make_report()
    places: list[str] = []

    def walk(value: Any, path: str) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            if "/" not in str(key):
                places.append(f"{path}/{key}".lstrip("/"))
                walk(inner, places[-1])

    walk(report, "")
    for place in sorted(data.draw(st.sets(st.sampled_from(places), min_size=1, max_size=12)), reverse=True):
        report = set_at(report, place, None)
    folder = tmp_path_factory.mktemp("null")
    try:
        write(report, [], folder)
    except RedflagError as error:
        assert "must be a report.json" in str(error) and not list(folder.iterdir())
    else:
        text = (folder / "report.md").read_text(encoding="utf-8")
        assert "None" not in text and "nan" not in text


def test_an_older_report_stays_when_a_new_one_cannot_be_written(folder, tmp_path):
    write(make_report(), [], tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    report = read(make_report())
    methods = {"redflag": replace(report.methods["redflag"], pooled=Slice(1, 2, auroc=math.nan))}
    with pytest.raises(ValueError, match="not JSON compliant"):
        reporting.write(replace(report, methods=methods), [], tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize("module", ["vl_convert", "jinja2"])
def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    for act in (require, lambda: write(make_report(), [], tmp_path)):
        with pytest.raises(RedflagError, match=r"not installed.*pip install 'redflag-llm\[report\]'"):
            act()
    assert not list(tmp_path.iterdir())


def test_text_has_enough_contrast_in_both_themes():
    from importlib import resources

    style = resources.files("redflag.lab.report").joinpath("assets", "report.css").read_text(encoding="utf-8")

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r"\{[^{}]*--paper:[^{}]*\}", style)
    ]
    assert len(themes) == 3 and themes[1] == themes[2]
    for theme in themes:
        for ink in ("ink", "quiet", "harm", "calm"):
            for ground in ("paper", "raised"):
                light, dark = sorted((luminance(theme[ink]), luminance(theme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)
