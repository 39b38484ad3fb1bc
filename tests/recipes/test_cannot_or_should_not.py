"""The recipe on refusals: what its preparation says of each set, and that the verb learns from what it writes."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from pathlib import Path

import pytest

from redflag import cli
from redflag.errors import RedflagError
from redflag.lab.refusals import audit, load_taxonomy

RECIPE = Path(__file__).parents[2] / "recipes" / "papers" / "cannot-or-should-not"
DATA = Path(os.environ.get("REDFLAG_DATA", Path(__file__).parents[3] / "shared" / "data"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"cannot_{name}", RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare, measure = load("prepare"), load("measure")


def fill(folder, name, rows):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"{name.partition('/')[0]}-train-{i}", "lang": "en", **row} for i, row in enumerate(rows)]
    (folder / name).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@pytest.fixture
def data(tmp_path):
    """A few rows in the shape of each set."""
    no, yes = "I cannot help with that request.", "Here is what the question asked for."
    both = [{"prompt": f"ask {i}", "response": no if i % 2 else yes, "extra": {}} for i in range(12)]
    fill(
        tmp_path,
        "gptfuzz-labeled/train.jsonl.gz",
        [r | {"label": "benign" if r["response"] == no else "harmful"} for r in both],
    )
    fill(
        tmp_path,
        "refusal-direction/train.jsonl.gz",
        [
            {"prompt": "d1", "response": no, "category": "Privacy", "extra": {"substring_jailbreak": "0"}},
            {"prompt": "d2", "response": yes, "category": "Privacy", "extra": {"substring_jailbreak": "1"}},
            {"prompt": "d3", "response": no, "category": "harmless", "extra": {"intervention": "actadd"}},
            {"prompt": "d4", "response": yes, "category": "harmless", "extra": {"intervention": "baseline"}},
            {"prompt": "d5", "response": yes, "category": "Privacy", "extra": {}},
        ],
    )
    kinds = load_taxonomy().classes()
    asked = [{"prompt": f"{kinds[i % 2]} thing {i}", "category": f"{kinds[i % 2]}/whatever"} for i in range(12)]
    fill(tmp_path, "prompts/coconot-eval.jsonl.gz", asked)
    first = (RECIPE / "read.tsv").read_text().splitlines()[1].split("\t")
    fill(tmp_path, "jbb-artifacts/train.jsonl.gz", [{"prompt": "r", "response": no, "id": first[0], "label": "benign"}])
    return tmp_path


def test_S4_2_the_recipe_says_of_each_set_what_it_can(data, tmp_path, capsys):
    prepare.main(data, tmp_path / "out", 0)
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    said = {row["prompt"]: (row.get("refusal"), row.get("prompt_label")) for row in rows}
    assert {key: said.get(key) for key in ("ask 0", "ask 1", "d1", "d2", "d3", "d4", "d5")} == {
        "ask 0": (False, "harmful"),
        "ask 1": (True, "harmful"),
        "d1": (True, "harmful"),
        "d2": (False, "harmful"),
        "d3": (True, "benign"),
        "d4": (False, "benign"),
        "d5": None,
    }
    read = [json.loads(line) for line in (tmp_path / "out" / "read.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in read] == ["r"] and "r" not in said
    assert "derta-malicious-tuning" in capsys.readouterr().out
    with pytest.raises(RedflagError, match="holds none of the sets"):
        prepare.main(tmp_path / "nowhere", tmp_path / "out", 0)


def test_S4_2_the_verb_learns_from_what_the_recipe_writes(data, tmp_path, capsys):
    prepare.main(data, tmp_path / "out", 0)
    words = ["--train", f"{tmp_path}/out/train.jsonl", "--classifier", f"{tmp_path}/c", "--folds", "2"]
    assert audit.run(*cli.parse(audit, words, "redflag audit")) == 0
    measure.main([tmp_path / "c"], tmp_path / "out" / "read.jsonl")
    assert capsys.readouterr().out.count("1 of 1 refusals found") == 2


def test_no_set_is_both_learnt_from_and_read():
    learnt = {name.partition("/")[0] for name, *_ in prepare.SOURCES}
    lines = (RECIPE / "read.tsv").read_text().splitlines()
    assert lines[0] == "id\trefusal" and {line.split("\t")[1] for line in lines[1:]} == {"0", "1"}
    assert not any(line.startswith(tuple(f"{name}-" for name in learnt)) for line in lines[1:])


@pytest.mark.skipif(not (DATA / prepare.KINDS).exists(), reason="needs the public sets (REDFLAG_DATA=FOLDER)")
def test_S4_2_coconots_own_labels_are_all_known():
    taxonomy = load_taxonomy()
    labels = {row["category"] for row in prepare._read(DATA / prepare.KINDS)}
    assert all(taxonomy.label(label) for label in labels) and {taxonomy.label(x) for x in labels} == set(
        taxonomy.classes()
    )
    assert [x for x in labels if taxonomy.label(x, "subcategory") is None] == [
        "Requests with safety concerns/incomprehensible"
    ]
