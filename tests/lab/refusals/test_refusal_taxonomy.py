"""Taxonomies: the shipped one is CoCoNot's, another one is a file, and a wrong file is refused with its place."""

from __future__ import annotations

import copy

import pytest
import yaml
from refusing import TAXONOMY

from redflag.errors import RedflagError
from redflag.lab.refusals.taxonomy import FAMILIES, load_taxonomy, parse_taxonomy


def test_S4_2_the_shipped_taxonomy_is_coconots_and_says_so():
    taxonomy = load_taxonomy()
    assert taxonomy.name == "CoCoNot" and "allenai/noncompliance" in taxonomy.source
    assert taxonomy.classes() == (
        "Requests with safety concerns",
        "Incomplete requests",
        "Unsupported requests",
        "Indeterminate requests",
        "Humanizing requests",
    )
    assert {taxonomy.family(name) for name in taxonomy.classes("subcategory")} == set(FAMILIES)
    assert len(set(taxonomy.classes("subcategory"))) == 18


@pytest.mark.parametrize(
    ("text", "category", "subcategory"),
    [
        # As they stand in CoCoNot's own files.
        ("Incomplete requests/underspecified", "Incomplete requests", "Incomplete requests/underspecified"),
        (
            "Requests with safety concerns/false information",
            "Requests with safety concerns",
            "Requests with safety concerns/misinformation",
        ),
        ("Requests with safety concerns/incomprehensible", "Requests with safety concerns", None),
        ("  HUMANIZING   requests/personal inquiry", "Humanizing requests", "Humanizing requests/personal inquiry"),
        ("Humanizing requests", "Humanizing requests", None),
        ("weapons", None, None),
        ("", None, None),
    ],
)
def test_S4_2_labels_mean_a_category_and_a_subcategory_or_nothing(text, category, subcategory):
    taxonomy = load_taxonomy()
    assert taxonomy.label(text) == category
    assert taxonomy.label(text, "subcategory") == subcategory


def test_S4_2_sixteen_categories_can_be_dropped_in(tmp_path):
    path = tmp_path / "sixteen.yaml"
    names = [f"category {i}" for i in range(16)]
    found = [{"name": name, "family": FAMILIES[i % 2]} for i, name in enumerate(names)]
    path.write_text(yaml.safe_dump({"name": "Sixteen", "categories": found}))
    taxonomy = load_taxonomy(path)
    assert taxonomy.classes() == taxonomy.classes("subcategory") == tuple(names)
    assert [taxonomy.label(name, "subcategory") for name in names] == names


def test_a_taxonomy_survives_being_written_down():
    taxonomy = load_taxonomy()
    assert parse_taxonomy(taxonomy.to_dict(), "here") == taxonomy


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["name"], None, "name must be a text (got None)"),
        (["name"], 7, "name must be a text (got 7)"),
        (["author"], "me", "unknown key 'author'"),
        (["categories"], [], "categories must be a collection of 2 or more"),
        (["categories"], "all", "categories must be a list (got 'all')"),
        (["categories", 1], "Unclear", "categories[1] must be a mapping"),
        (["categories", 1, "name"], " ", "categories[1].name"),
        (["categories", 1, "name"], "a/b", "must not contain a slash"),
        (["categories", 1, "name"], "PRIVATE", "'private' twice"),
        (["categories", 2, "also"], ["vague"], "'vague' twice"),
        (["categories", 1, "family"], "should-not", "family must be 'cannot' or 'should_not' (got 'should-not')"),
        (["categories", 0, "phrases"], "personal data", "categories[0].phrases must be a list"),
        (
            ["categories", 0, "phrases"],
            ["ok"],
            "categories[0].phrases[0] must be a text of 3 or more characters (got 'ok')",
        ),
        (["categories", 0, "subcategories"], {"a": 1}, "subcategories must be a list"),
        (
            ["categories", 0, "subcategories"],
            [{"name": "x", "family": "cannot"}],
            "subcategories[0]: unknown key 'family'",
        ),
    ],
)
def test_S4_2_a_taxonomy_that_is_wrong_is_refused_with_its_place(tmp_path, path, value, says):
    record = copy.deepcopy(yaml.safe_load(TAXONOMY))
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(record))
    with pytest.raises(RedflagError) as caught:
        load_taxonomy(file)
    assert says in str(caught.value) and "t.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b", "", "a: [", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_mapping_is_no_taxonomy(tmp_path, text):
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(RedflagError, match=r"t\.yaml"):
        load_taxonomy(file)
    with pytest.raises(RedflagError, match="cannot be read"):
        load_taxonomy(tmp_path / "none.yaml")
