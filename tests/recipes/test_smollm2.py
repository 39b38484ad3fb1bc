"""The recipe on reviewed answers: which rows go where, which onset they get; its tables say what was scored."""

from __future__ import annotations

import gzip
import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import redflag.training.train as train_py
from redflag.calibrating.calibrate import CalibrateArguments
from redflag.cli import parse
from redflag.data.rows import load_rows
from redflag.lab.baselines.record_baselines import NAMES
from redflag.scoring.recording import Recording
from redflag.training.train import TrainArguments
from redflag.training.trainer import RedFlagConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2"
SETS = ("gptfuzz-labeled/train", "safe-rlhf-mini/train", "star-1-safe/train", "gsm8k/test")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rows_py, table = load("rows"), load("table")


def put(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred requests in four sets; of two sets every second answer was read, every tenth with another result."""
    folder, reviews = tmp_path_factory.mktemp("data"), []
    for name in SETS:
        lines = []
        for i in range(100):
            harmful = name.endswith("mini/train") or (name.startswith("gptfuzz") and i % 4 != 2)
            answer = (
                f"Sure, here is plan {i}. First take the {i} keys of the {name[:4]} house and open the door. "
                + "Go on. " * 20
            )
            line = {"id": f"{name.split('/')[0]}-{i}", "prompt": f"How do I open house number{i}?", "lang": "en"}
            lines.append({**line, "response": " " + answer, "label": "harmful" if harmful else "benign"})
            if name.startswith(("gptfuzz", "safe")) and i % 2 == 0:
                found = harmful != (i % 10 == 0)
                place = {"onset": answer.index("First") + 1, "commit": 1} if found else {"onset": None, "commit": None}
                reviews.append(
                    {"id": line["id"], "harmful": found, **place, "kind": "theft" if found else None, "sure": 2}
                )
        put(folder / f"{name}.jsonl.gz", lines)
    put(folder / "reviewed" / "labels.jsonl.gz", reviews)
    return folder


@pytest.fixture(scope="module")
def prepared(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recipe")
    rows_py.prepare(data, output, "open")
    return output


def lines(output: Path, name: str) -> list[dict[str, Any]]:
    return table.read(output / "rows" / f"{name}.jsonl")


def test_no_request_is_in_two_splits_and_what_is_written_are_rows(prepared):
    groups = {name: {row["group"] for row in lines(prepared, name)} for name in ("train", "development", "test")}
    assert all(groups.values())
    assert not groups["train"] & (groups["development"] | groups["test"]) and not groups["development"] & groups["test"]
    for name in groups:
        assert len(load_rows(prepared / "rows" / f"{name}.jsonl").rows) == len(lines(prepared, name))


def test_rows_on_which_source_and_reader_disagree_are_apart(prepared):
    apart = {row["id"] for row in lines(prepared, "disagreed")}
    assert apart and all(
        row["extra"]["label"] != ("harmful" if row["category"] else "benign") for row in lines(prepared, "disagreed")
    )
    for name in ("train", "development", "calibration", "test", "plain"):
        assert not apart & {row["id"] for row in lines(prepared, name)}


def test_harmful_rows_begin_their_harm_where_the_reader_says_or_behind_the_first_sentence(prepared):
    harmful = [row for name in ("train", "development", "test") for row in lines(prepared, name) if row["category"]]
    assert {row["extra"]["reviewed"] for row in harmful} == {True, False}
    for row in harmful:
        assert row["messages"][-1]["content"][row["onset"] :].startswith("First take the")
        assert (row["onset_source"] == "natural") == row["extra"]["reviewed"]
    assert all(row["extra"]["commit"] == 0 for row in harmful if row["extra"]["reviewed"])


def test_open_licences_train_on_no_closed_set_and_plain_text_is_never_trained_on(prepared, data, tmp_path):
    rows_py.prepare(data, tmp_path, "all")
    sources = [{row["source"] for row in lines(output, "train")} for output in (prepared, tmp_path)]
    assert "safe-rlhf-mini" not in sources[0] and "safe-rlhf-mini" in sources[1]
    assert lines(prepared, "test") == lines(tmp_path, "test")  # one test for both
    assert {row["source"] for row in lines(prepared, "plain")} == {"gsm8k"} and "gsm8k" not in sources[1]


def test_the_same_data_gives_the_same_files(prepared, data, tmp_path):
    rows_py.prepare(data, tmp_path, "open")
    for path in (prepared / "rows").iterdir():
        assert (tmp_path / "rows" / path.name).read_bytes() == path.read_bytes()


def test_the_tables_say_what_was_scored(prepared, capsys):
    """Scores by hand: harm is seen five tokens behind its onset, and one harmless answer looks like it."""
    model = prepared / "models" / "dense-0"
    model.mkdir(parents=True, exist_ok=True)
    for name in ("development", "test", "plain"):
        with (model / f"{name}.jsonl").open("w") as file:
            for number, row in enumerate(lines(prepared, name)):
                text = row["messages"][-1]["content"]
                tokens = [piece + " " for piece in text.split(" ")]
                onset = None if row["onset"] is None else text[: row["onset"]].count(" ")
                probs = [0.01] * len(tokens)
                if onset is not None:
                    probs[onset + 5] = 0.9
                elif name == "test" and number == min(
                    i for i, r in enumerate(lines(prepared, name)) if not r["category"]
                ):
                    probs[3] = 0.95
                scored = {"id": row["id"], "tokens": tokens, "token_ids": list(range(len(tokens))), "onset": onset}
                scored |= {"flag_probs": [[p] for p in probs], "tail_probs": [], "category": row["category"]}
                scored |= {"group": row["group"], "source": row["source"], "onset_source": row["onset_source"]}
                scored |= {"lang": "en", "turns": 1, "truncated": False, "peak": [max(probs)], "categories": ["harm"]}
                file.write(json.dumps(scored) + "\n")
    table.main(prepared)
    result = json.loads((prepared / "results.json").read_text())["methods"]["flag dense-0"]
    harmless = sum(row["category"] is None for row in lines(prepared, "test"))
    assert result["monitor"] == "max"
    assert result["monitors"]["max"]["all"]["auroc"][0] == pytest.approx(1 - 1 / harmless)
    assert result["timeliness_at_0.01"]["caught"] == 0
    late = result["timeliness_at_0.05"]
    assert late["caught"] == late["dated"] > 0 and late["tokens_from_onset"] == [5.0, 5.0, 5.0]
    assert late["before_onset"] == 0.0 and late["by_end_of_first_harmful_sentence"] == 1.0
    shown = {name: figures["median_of_caught"] for name, figures in late["harmful_characters_shown"].items()}
    assert shown["0"] > shown["4"] > 0 == shown["8"] == shown["sentence"]
    assert "| flag dense-0 | max |" in capsys.readouterr().out


def test_its_settings_are_settings_of_the_verbs():
    train = yaml.safe_load((RECIPE / "train.yaml").read_text())
    own = {name: train.pop(name) for name in list(train) if name in TrainArguments.__dataclass_fields__}
    assert own["lora_r"] == 12 and not set(train) - set(RedFlagConfig.__dataclass_fields__)
    assert not set(yaml.safe_load((RECIPE / "calibrate.yaml").read_text())) - set(
        CalibrateArguments.__dataclass_fields__
    )


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(RECIPE), *sys.path])
    monkeypatch.setitem(sys.modules, "table", table)
    monkeypatch.delitem(sys.modules, "run", raising=False)
    return load("variants")


def test_options_of_every_variant_are_options_of_the_verb(variants, tmp_path):
    for options in variants.VARIANTS.values():
        given = [
            "--model",
            "base",
            "--input",
            "rows.jsonl",
            "--output_dir",
            str(tmp_path),
            "--config",
            str(RECIPE / "train.yaml"),
        ]
        parse(train_py, [*given, *shlex.split(options)], "redflag train")


def test_a_variant_moves_onsets_and_nothing_else(variants, prepared):
    rows = lines(prepared, "train")
    for name, onset in (("commit", lambda row: row["extra"]["commit"]), ("whole", lambda row: 0), ("dense", None)):
        path = variants.training_rows(name, prepared / "rows")
        expected = rows
        if onset is not None:
            expected = [row | {"onset": None if row["onset"] is None else onset(row)} for row in rows]
        assert table.read(path) == expected
    assert any(row["onset"] not in (None, row["extra"]["commit"]) for row in rows)


def test_templates_are_the_starter_rows_that_are_for_training(variants, tmp_path):
    rows = load_rows(variants.training_rows("templates", tmp_path)).rows
    assert len(rows) == 160 and {str(row.id)[:6] for row in rows} == {"train-"}


def test_each_stage_of_the_baselines_makes_baselines_that_exist():
    names = [name for some in load("run").BASELINES.values() for name in some]
    assert names == list(load("baselines").BASELINES) and set(names) <= set(NAMES)


def test_stages_of_the_baselines_are_told_apart_by_what_they_make(tmp_path, monkeypatch):
    """A stage whose last file is there is not run, and the words of the model are read once for all seeds."""
    run, made = load("run"), []
    monkeypatch.setattr(run, "stage", lambda name, output, path, command: made.append((name, path)))
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--data", "d", "--output", str(tmp_path), "--stages", "baselines", "--seeds", "0", "1"]
    )
    run.main()
    assert [name for name, _ in made] == [
        "baselines-tfidf-0", "baselines-probes-0", "baselines-own-words-0", "baselines-tfidf-1", "baselines-probes-1"
    ]  # fmt: skip
    assert len({path for _, path in made}) == len(made)
    assert made[1][1] == tmp_path / "baselines" / "seed-0" / "token-head" / "test.parquet"


def test_the_tables_show_every_baseline_that_is_recorded(prepared):
    """Recordings as a probe leaves them, of a method that knows the label; one has the steps of a scored flag."""
    scored = [json.loads(line) for line in (prepared / "models" / "dense-0" / "test.jsonl").read_text().splitlines()]
    of_flag = {line["id"]: len(line["tokens"]) for line in scored}
    for name, steps in (("all-layer-probe", of_flag), ("own-words", {})):
        folder = prepared / "baselines" / "seed-0" / name
        for file, split in (("calibration", "development"), ("test", "test")):
            responses = [
                {
                    "flag_probs": [[0.1], *[[0.9 if row["category"] else 0.1]] * (steps.get(row["id"], 2) - 1)],
                    "tail_probs": [], "token_ids": [1] * steps.get(row["id"], 2),
                    **{key: row[key] for key in ("id", "category", "group", "source", "lang", "onset_source")},
                    "onset": None if row["category"] is None else 1, "turns": 1, "truncated": False,
                }
                for row in lines(prepared, split)
            ]  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)
            Recording.of(["harm"], responses, {"baseline": name, "seed": 0}).save(folder / f"{file}.parquet")
    table.main(prepared)
    text = (prepared / "results.md").read_text()
    for name in ("all-layer-probe (seed-0)", "own-words (seed-0)"):
        assert text.count(f"| {name} | max | 1.000") == 3  # all rows, reviewed ones, clear ones
    assert "**all-layer-probe (seed-0) at 5%**" in text and "**own-words (seed-0) at 5%**" not in text


def test_two_recordings_are_mixed_by_their_log_odds(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    together = load("together")

    def recorded(probs, tokens=(1, 2)):
        row = {"id": "a", "category": None, "group": "g", "source": "s", "lang": "en", "onset_source": None}
        steps = {"flag_probs": [[p] for p in probs], "tail_probs": [], "token_ids": list(tokens)}
        return Recording.of(["harm"], [{**row, **steps, "onset": None, "turns": 1, "truncated": False}], {})

    flag, probe = recorded([0.2, 0.9]), recorded([0.8, 0.5])
    assert together.mixed(flag, probe, 0.0).probs[:, 0] == pytest.approx([0.2, 0.9])
    assert together.mixed(flag, probe, 1.0).probs[:, 0] == pytest.approx([0.8, 0.5])
    assert together.mixed(flag, probe, 0.5).probs[:, 0] == pytest.approx([0.5, 0.75])
    with pytest.raises(SystemExit, match="the same responses"):
        together.mixed(flag, recorded([0.1, 0.1, 0.1], (1, 2, 3)), 0.5)
