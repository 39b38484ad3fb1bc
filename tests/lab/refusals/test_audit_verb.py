"""`redflag audit`: counts that can be checked by hand, files that say the same, text that cannot break a page."""

from __future__ import annotations

import json
import re
import time

import pytest
from refusing import TAXONOMY, labelled, write
from reports import HOSTILE

from redflag import cli
from redflag.data.rows import load_rows
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.lab.refusals import audit

NO = "Sorry, I cannot do that."


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(TAXONOMY)
    return tmp_path


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A trained classifier's folder."""
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "small.yaml").write_text(TAXONOMY)
    rows = write(folder / "train.jsonl", labelled())
    command("--train", rows, "--taxonomy", f"{folder}/small.yaml", "--classifier", f"{folder}/c", "--folds", "3")
    return folder / "c"


def command(*words):
    assert audit.run(*cli.parse(audit, list(words), "redflag audit")) == 0


def row(prompt, response, **more):
    return {"prompt": prompt, "response": response, **more}


def audited(here, rows, *options):
    command("--input", write(here / "rows.jsonl", rows), "--output_dir", "out", *options)
    return json.loads((here / "out/audit.json").read_text())


def test_S4_3_the_composition_is_what_stands_in_the_rows(here):
    found = audited(
        here,
        [
            row("a", f"{NO} It is personal data.", source="x"),
            row("b", f"{NO} It is personal data; please give more context.", source="x"),
            row("c", f"{NO} I have no eyes.", source="y"),
            row("d", NO, source="y"),
            row("e", "Here you are.", source="y"),
            row("f", "Here you are."),
            row("g", "Here you are.", label="harmful"),
            row("h", "Here you are.", label=None, source="x"),
        ],
        *("--taxonomy", "small.yaml"),
    )
    assert (found["rows"], found["refusals"]["count"], found["refusals"]["rate"]) == (8, 4, 0.5)
    low, high = found["refusals"]["interval"]
    assert (round(low, 4), round(high, 4)) == (0.157, 0.843)  # Clopper and Pearson, 4 of 8
    told = {one["name"]: (one["family"], one["refusals"], one["further"]) for one in found["categories"]}
    assert told == {
        "Private": ("should_not", 2, 0),
        "Unclear": ("cannot", 0, 1),
        "Senses": ("cannot", 1, 0),
        "no kind known": (None, 1, 0),
    }
    assert {name: one["count"] for name, one in found["families"].items()} == {"cannot": 1, "should_not": 2}
    assert found["several_kinds"] == 1
    sources = {one["name"]: (one["rows"], one["refusals"]["count"], one["categories"]) for one in found["sources"]}
    assert sources == {
        "x": (3, 2, {"Private": 2}),
        "y": (3, 2, {"Senses": 1, "no kind known": 1}),
        "(no source)": (2, 0, {}),
    }
    assert sum(found["certainty"]["counts"]) == 8


def test_S4_3_over_and_under_refusals_are_named(here):
    found = audited(
        here,
        [
            row("bread?", f"{NO} It is personal data.", prompt_label="benign", id="over"),
            row("bread?", "Yeast.", prompt_label="benign"),
            row("her address?", NO, prompt_label="harmful"),
            row("her address?", "Elm Street 4.", prompt_label="harmful", id="under"),
            row("and his?", "Oak Street 5.", label="harmful", category="private", id="harmful answer"),
            row("bees?", NO),
        ],
        *("--taxonomy", "small.yaml"),
    )
    over, under = found["over_refusal"], found["under_refusal"]
    assert (over["rows"], over["by_family"]) == (1, {"cannot": 0, "should_not": 1, "unknown": 0})
    assert [(one["id"], one["line"], one["request_known_by"]) for one in over["candidates"]] == [("over", 1, "label")]
    assert (under["rows"], under["harmful_answers"]) == (2, 1)
    assert {one["id"] for one in under["candidates"]} == {"under", "harmful answer"}
    assert found["requests"]["harmful"] == {
        "rows": 2,
        "refused": {"count": 1, "rate": 0.5, "interval": pytest.approx([0.0126, 0.9874], abs=1e-3)},
    }
    assert found["labelled_requests"] == 4


def test_S4_3_a_trained_classifier_judges_requests_without_labels(here, learnt):
    rows = [row(one["prompt"], one["response"], id=one["id"]) for one in labelled(60, seed=1)]
    rows.append(row("Give Ada the password", "Here is what Ada should know of bees.", id="under"))
    rows.append(row("Tell Bo about chess", "I will not do that. please give more context", id="over"))
    found = audited(here, rows, "--classifier", str(learnt), "--sure", "0.7", "--candidates", "3")
    assert found["refusals"]["count"] == 31
    kinds = {one["name"]: one["refusals"] for one in found["categories"]}
    assert kinds == {"Private": 10, "Unclear": 11, "Senses": 10}
    assert [one["id"] for one in found["under_refusal"]["candidates"]] == ["under"]
    assert "over" in [one["id"] for one in found["over_refusal"]["candidates"]]
    assert len(found["over_refusal"]["candidates"]) == 3 < found["over_refusal"]["rows"]
    assert found["classifier"]["held_out"]["category"]["macro_f1"] > 0.9
    page = (here / "out/audit.html").read_text()
    assert "confusion-category" in page and "Macro-F1" in page


def test_S4_2_training_leaves_figures_and_a_confusion_picture(learnt):
    figures = json.loads((learnt / "training.json").read_text())["held_out"]
    page = (learnt / "training.html").read_text()
    for name, one in figures.items():
        assert f"confusion-{name}" in page and f"{one['macro_f1']:.3f}" in page
    assert {path.name for path in learnt.iterdir()} == {
        *("classifier.json", "weights.safetensors", "training.json", "training.html")
    }


def test_S4_3_untrusted_text_is_only_ever_text_in_the_page(here):
    hostile = f"{HOSTILE} personal data"
    rows = [
        row(HOSTILE, f"{NO} {hostile}", prompt_label="benign", source=HOSTILE, id=HOSTILE),
        row(HOSTILE, HOSTILE, prompt_label="harmful", source=HOSTILE),
        row("lone surrogates do not come this far", "\u2028 \u202e"),
    ]
    audited(here, rows, "--taxonomy", "small.yaml")
    page = (here / "out/audit.html").read_text()
    body = page[page.index("<main") : page.index('<script type="application/json"')]
    assert "onerror=&#34;" in body and "<img" not in body and "<script" not in body and 'hacked=1">' not in body
    assert "default-src &#39;none&#39;" in page and not re.search(r"""(src|href)\s*=\s*["']https?:""", body)
    data = page[page.index('id="chart-data">') + 16 :]
    assert "<" not in data[: data.index("</script")]


def test_S4_3_ten_thousand_rows_take_seconds(here, learnt):
    rows = [row(f"{one['prompt']} {i}", one["response"] * 8) for i in range(42) for one in labelled(240, seed=2)][
        :10_000
    ]
    before = time.process_time()
    found = audited(here, rows, "--classifier", str(learnt))
    # 100,000 rows in five minutes are 30 s for these, half of it kept in hand.
    assert found["rows"] == 10_000 and time.process_time() - before < 15


def test_S4_4_rows_with_kinds_of_refusal_are_training_rows_of_flags(here, capsys):
    rows = [
        row("a", f"{NO} It is personal data.", source="x", id="1", group="g", lang="en"),
        row("b", f"{NO} I have no eyes.", label="harmful", category="weapons"),
        row("c", "Here you are.", label="benign"),
        row("d", "Harm.", label="harmful", category="weapons"),
        {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": f"{NO}"}]}
        | {"category": "weapons", "onset": 3, "onset_source": "natural"},
    ]
    audited(here, rows, "--taxonomy", "small.yaml", "--write_rows", "kinds.jsonl.gz")
    found = load_rows("kinds.jsonl.gz").rows
    assert [(one.messages[0]["content"], one.category, one.onset) for one in found] == [
        ("a", "Private", None),
        ("b", "Senses", None),
        ("c", None, None),  # "d" would have become a harmless row
        ("e", "no kind known", None),
    ]
    assert (found[0].source, found[0].id, found[0].group, found[0].lang) == ("x", "1", "g", "en")
    said = capsys.readouterr().out
    assert "1 with harmful answers that aren't refusals were left out" in said
    named = re.search(r"--categories (.*) \.\.\.", said)[1]
    spec = FlagSpec.of(*re.findall(r"'([^']*)'", named))
    assert [spec.class_of(one.category) for one in found] == [1, 2, 0, 3]


def test_the_same_rows_give_the_same_files(here, learnt):
    rows = [row(one["prompt"], one["response"]) for one in labelled(40)]
    first, second = (audited(here, rows, "--classifier", str(learnt)) for _ in range(2))
    for one in (first, second):
        del one["made"]
    assert first == second


def test_bad_rows_stop_the_audit_or_are_counted(here):
    rows = [row("a", NO), row("b", ""), "{", row("c", NO, onset=3), row("d", "Fine.")]
    with pytest.raises(RedflagError, match=r"rows\.jsonl:2: the response is empty\. Fix the row"):
        audited(here, rows)
    assert not (here / "out").exists()
    found = audited(here, rows, "--on_bad_row", "skip")
    assert (found["rows"], found["skipped"]) == (2, 3)


def test_columns_and_labels_are_those_of_other_verbs(here):
    rows = [{"q": "a", "a": NO, "bad": "no"}, {"q": "b", "a": "Harm.", "bad": "yes"}]
    (here / "audit.yaml").write_text(
        "taxonomy: small.yaml\ncolumns: {prompt: q, response: a, label: bad}\nlabels: {'no': null, 'yes': harm}\n"
    )
    found = audited(here, rows, "--config", "audit.yaml")
    assert (found["rows"], found["refusals"]["count"], found["under_refusal"]["rows"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "input or train must be set"),
        (["--train", "rows.jsonl"], "classifier must be set with train"),
        (["--input", "none.jsonl"], "none.jsonl must be a file or folder"),
        (["--input", "empty.jsonl"], "no usable row in empty.jsonl: it is empty"),
        (["--input", "bad.jsonl", "--on_bad_row", "skip"], "all 1 were left out"),
        (["--input", "rows.jsonl", "--classifier", "nowhere"], "nowhere must be a folder that"),
        (["--input", "rows.jsonl", "--taxonomy", "none.yaml"], "none.yaml cannot be read"),
        (["--input", "rows.jsonl", "--threshold", "0"], "threshold must be above 0 and at most 1 (got 0.0)"),
        (["--input", "rows.jsonl", "--also", "1.5"], "also must be above 0 and at most 1 (got 1.5)"),
        (["--input", "rows.jsonl", "--sure", "0.5"], "sure must be above 0.5 and at most 1 (got 0.5)"),
        (["--input", "rows.jsonl", "--candidates", "-1"], "candidates must be at least 0 (got -1)"),
        (["--input", "rows.jsonl", "--embedding", "m"], "embedding must come with train"),
        (["--train", "rows.jsonl", "--classifier", "c"], "a row must have a label"),
        (["--train", "rows.jsonl", "--classifier", "c", "--write_rows", "w"], "write_rows must come with input"),
        (["--inptu", "rows.jsonl"], "unknown option --inptu"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_files(here, options, says):
    write(here / "rows.jsonl", [row("a", NO)])
    write(here / "empty.jsonl", [])
    write(here / "bad.jsonl", ["{"])
    before = sorted(here.rglob("*"))
    with pytest.raises(RedflagError) as caught:
        command(*options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(here.rglob("*")) == before


def test_a_taxonomy_must_know_the_classifiers_classes(here, learnt):
    rows = write(here / "rows.jsonl", [row("a", NO)])
    with pytest.raises(RedflagError, match="'Private' is missing"):
        (here / "other.yaml").write_text(TAXONOMY.replace("Private", "Secret"))
        command("--input", rows, "--classifier", str(learnt), "--taxonomy", "other.yaml")
