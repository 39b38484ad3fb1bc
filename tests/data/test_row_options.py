"""Rows of public shapes through the command line: every verb reads the same, and says what it makes of labels."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import WORDS

from redflag import cli
from redflag.calibrating import calibrate
from redflag.data.rows import load_rows
from redflag.lab.evaluating import evaluate
from redflag.lab.refusals import audit
from redflag.scoring import score
from redflag.scoring.score import read_scored
from redflag.terminal import show
from redflag.training import train


@pytest.fixture
def here(origin, tmp_path, monkeypatch):
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(number):
    return " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(6))


def beaver(number):
    """A record as BeaverTails has them; every third one is harmful."""
    bad = number % 3 == 0
    return {
        "prompt": f"tell {WORDS[number % 9]}",
        "response": words(number),
        "category": {"animal_abuse": False, "fraud": bad and number % 2 == 0, "violence": bad},
        "is_safe": not bad,
    }


def table(count):
    """CSV of answers under other names, the label in words."""
    lines = [f"{words(i)},{WORDS[i % 9]},{'bad' if i % 3 == 0 else 'fine'},violence" for i in range(count)]
    return "\n".join(["answer,question,verdict,category", *lines, ""])


MAPPED = ["--columns", '{"prompt": "question", "response": "answer", "label": "verdict", "category": null}']
MAPPED += ["--labels", '{"bad": "harm", "fine": null}']


def test_training_says_what_it_makes_of_the_labels_of_beavertails(here, capsys):
    (here / "beaver.json").write_text(json.dumps([beaver(i) for i in range(24)]))
    options = ["--model", "base", "--input", "beaver.json", "--output_dir", "new", "--categories", "fraud", "violence"]
    small = ["--max_steps", "1", "--per_device_train_batch_size", "3", "--max_length", "64", "--use_cpu", "true"]
    assert cli.main(["train", *options, *small, "--max_rows", "12", "--report_to", "none"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("24 rows: 8 harmful, 16 harmless")
    assert lines[begin + 1 : begin + 4] == [
        "         16  harmless",
        "          4  harmful   fraud",
        "          4  harmful   violence",
    ]
    assert (here / "new" / "redflag.json").exists()
    record = json.loads((here / "new" / "train.json").read_text())
    assert record["rows"]["train"] == 12 and record["data"]["beaver.json"]["rows"] == 24


def test_training_on_topics_is_warned_of_before_it_is_refused(here, capsys):
    topic = {"prompt": "tell", "response": "cat", "category": "violence"}
    (here / "topics.jsonl").write_text("".join(json.dumps(topic) + "\n" for _ in range(20)))
    argv = ["train", "--model", "base", "--input", "topics.jsonl", "--output_dir", "new", "--use_cpu", "true"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert "20 rows: 20 harmful, 0 harmless" in out
    assert "warning: every row has a category, so all 20 count as harmful." in out
    assert "got 18 rows, none of them harmless" in err
    assert cli.main([*argv, "--columns", '{"category": null}']) == 2
    out, err = capsys.readouterr()
    assert "20 rows: 0 harmful, 20 harmless" in out and "warning" not in out
    assert "got 18 rows, none of them harmful" in err


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_score_and_show_read_every_format_by_the_same_options(here, capsys, kind):
    import datasets

    (here / "rows.csv").write_text(table(9))
    if kind == "json":
        records = [dict(zip(("answer", "question", "verdict", "category"), line.split(","), strict=True))
                   for line in table(9).splitlines()[1:]]  # fmt: skip
        (here / "rows.json").write_text(json.dumps(records))
    elif kind == "parquet":
        datasets.Dataset.from_csv("rows.csv").to_parquet("rows.parquet")
    assert cli.main(["score", "--model", "model", "--input", f"rows.{kind}", "--output", "out.jsonl", *MAPPED]) == 0
    scored = read_scored("out.jsonl")
    assert [row["category"] for row in scored] == ["harm", None, None] * 3
    capsys.readouterr()
    assert cli.main(["show", f"rows.{kind}", *MAPPED, "--only", "harmful", "--color", "never"]) == 0
    assert capsys.readouterr().out.count("harm from character 0") == 3


def test_scores_of_rows_that_were_read_otherwise_are_not_continued(here):
    (here / "rows.csv").write_text(table(9))
    argv = ["score", "--model", "model", "--input", "rows.csv", "--output", "out.jsonl"]
    first = load_rows("rows.csv", columns={"prompt": "question", "response": "answer"})
    second = load_rows("rows.csv", columns={"prompt": "answer", "response": "question"})
    assert first.sha256 == second.sha256 and first.fingerprint != second.fingerprint
    assert load_rows("rows.jsonl").fingerprint == load_rows("rows.jsonl").sha256
    for columns in ('{"prompt": "question", "response": "answer"}', '{"prompt": "answer", "response": "question"}'):
        assert cli.main([*argv, "--columns", columns]) == 0
    assert "".join(read_scored("out.jsonl")[0]["tokens"]) == WORDS[0]


def test_calibration_reads_csv_and_warns_where_no_harmless_row_is_left(here, capsys):
    (here / "rows.csv").write_text(table(90))
    argv = ["calibrate", "--model", "model", "--input", "rows.csv", "--target_fpr", "0.2", "--held_out", "0.5"]
    assert cli.main([*argv, *MAPPED]) == 0
    assert json.loads((here / "model" / "thresholds.json").read_text())["sample_size"] == 30
    capsys.readouterr()
    assert cli.main([*argv, "--columns", '{"prompt": "question", "response": "answer"}']) == 2
    warnings, error = capsys.readouterr().err.splitlines()
    assert warnings.startswith("warning: every row has a category, so all 90 count as harmful.")
    assert error.startswith("redflag calibrate: ")


def test_an_audit_reads_two_answers_of_a_record_and_csv(here, capsys):
    record = {"prompt": "tell", "response_0": "cat", "response_1": "I cannot help with that."}
    record |= {"is_response_0_safe": False, "is_response_1_safe": True}
    (here / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    assert cli.main(["audit", "--input", "pairs.jsonl", "--output_dir", "one"]) == 0
    assert json.loads((here / "one" / "audit.json").read_text())["rows"] == 2
    (here / "rows.csv").write_text(table(9))
    assert cli.main(["audit", "--input", "rows.csv", "--output_dir", "two", *MAPPED]) == 0
    assert json.loads((here / "two" / "audit.json").read_text())["rows"] == 9
    assert "warning" not in capsys.readouterr().err
    columns = ["--columns", '{"prompt": "question", "response": "answer"}']
    assert cli.main(["audit", "--input", "rows.csv", "--output_dir", "three", *columns]) == 0
    assert "warning: every row has a category, so all 9 count as harmful." in capsys.readouterr().err


@pytest.mark.parametrize("verb", [train, score, calibrate, evaluate, audit, show])
def test_every_verb_that_reads_rows_has_the_same_row_options(here, verb):
    required = {
        train: ["--model", "m", "--input", "i", "--output_dir", "o", "--use_cpu", "true"],
        score: ["--model", "m", "--input", "i", "--output", "o"],
        calibrate: ["--model", "m", "--input", "i"],
        evaluate: ["--model", "m", "--test", "t", "--calibration", "c"],
        audit: ["--input", "i"],
        show: ["i"],
    }[verb]
    (here / "options.yaml").write_text("columns: {category: null, response: [a, b]}\nlabels: {'yes': harm}\n")
    given = ["--columns", '{"category": null, "response": ["a", "b"]}', "--labels", '{"yes": "harm"}']
    for options in (given, ["--config", "options.yaml"]):
        options = [*options, "--split", "test", "--unlabelled", "skip"]
        arguments, *_ = cli.parse(verb, [*options, *required], "redflag x")
        assert arguments.row_options() == {
            "columns": {"category": None, "response": ["a", "b"]},
            "labels": {"yes": "harm"},
            "split": "test",
            "unlabelled": "skip",
        }


def test_a_wrong_column_is_one_sentence_of_the_verb(here, capsys):
    (here / "rows.csv").write_text(table(3))
    argv = ["score", "--model", "model", "--input", "rows.csv", "--output", "out.jsonl", "--columns"]
    for columns, sentence in {
        '{"prompt": "asked"}': "rows.csv:2: no column 'asked', which columns maps",
        '{"question": "prompt"}': "(got 'question')",
        '{"response": 3}': "columns must map 'response' to a column, a list of columns or null (got 3)",
        "{}": """If these columns hold it, add --columns '{"prompt": "question", "response": "answer"}'""",
    }.items():
        assert cli.main([*argv, columns]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sentence in line
