"""A constitution is read, or refused in one sentence that names the place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from redflag.errors import RedflagError
from redflag.lab.synthesis.constitution import load_constitution, parse_constitution
from redflag.lab.synthesis.requests import draw

RECIPES = Path(__file__).parents[3] / "recipes" / "papers" / "constitution"
GOOD = {
    "name": "x",
    "harmful": {"weapons": {"description": "Weapons.", "examples": ["How do I build a bomb?"]}},
    "harmless": {"history": {"description": "History.", "examples": ["When was gunpowder invented?"]}},
}


def changed(path, value):
    record = yaml.safe_load(yaml.safe_dump(GOOD))
    place = record
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([], ["F.yaml", "a mapping"]),
        (changed(["name"], None), ["name must be given"]),
        (changed(["colour"], "red"), ["unknown key 'colour'"]),
        (changed(["harmfull"], {}), ["'harmfull'", "Did you mean 'harmful'"]),
        (changed(["harmless"], None), ["harmless must be given"]),
        (changed(["harmful", "weapons", "exampels"], ["x"]), ["weapons", "'exampels'", "'examples'"]),
        (changed(["harmful", "weapons", "description"], " "), ["weapons", "description"]),
        (changed(["harmful", "weapons", "description"], 3), ["harmful.weapons.description must be a text (got 3)"]),
        (
            changed(["harmful", "weapons", "examples"], []),
            ["examples must be a collection of 1 or more (got []"],
        ),
        (changed(["harmful", "weapons", "examples"], "How?"), ["examples must be a list (got 'How?')"]),
        (changed(["harmful", "weapons", "examples"], None), ["harmful.weapons.examples must be given"]),
        (changed(["harmful", "weapons", "answers"], "obey"), ["(got 'obey')", "comply"]),
        (changed(["harmful", "weapons", "answers"], "refuse"), ["answers must not be refuse in a harmful class"]),
        (changed(["harmless", "history", "category"], "harm"), ["history", "must not have a category"]),
        (changed(["harmful", "weapons", "share"], 0), ["share must be above 0 (got 0)"]),
        (changed(["harmful", "weapons", "share"], True), ["share must be a number (got True)"]),
        (changed(["harmful", "weapons", "templates"], ["Build a {thing}"]), ["{thing}", "slots"]),
        (changed(["harmless", "weapons"], GOOD["harmless"]["history"]), ["each class its own name", "'weapons'"]),
        (changed(["wrappers"], ["Please."]), ["'Please.'", "{request}"]),
        (changed(["harmful"], ["weapons"]), ["harmful must be a mapping (got ['weapons'])"]),
    ],
)
def test_S3_1_a_bad_constitution_is_refused_in_one_sentence(record, words):
    with pytest.raises(RedflagError) as caught:
        parse_constitution(record, "F.yaml")
    text = str(caught.value)
    assert "F.yaml" in text and "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("content", "word"), [(b"a: [", "must be YAML"), (b"\xff", "must be YAML"), (None, "cannot be read")]
)
def test_S3_1_a_file_that_is_no_yaml_is_named(tmp_path, content, word):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RedflagError, match=word) as caught:
        load_constitution(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["constitution.yaml", "nano.yaml"])
def test_S3_1_the_shipped_constitutions_are_sound_and_have_both_sides(name):
    constitution = load_constitution(RECIPES / name)
    sides = [kind.harmful for kind in constitution.classes]
    assert any(sides) and not all(sides)
    assert all((kind.category is None) != kind.harmful for kind in constitution.classes)


def test_S3_1_shares_divide_the_requests_and_leave_no_class_out():
    constitution = load_constitution(RECIPES / "constitution.yaml")
    shares = constitution.shares(320)
    assert abs(sum(shares) - 320) <= len(shares)
    by_name = {kind.name: share for kind, share in zip(constitution.classes, shares, strict=True)}
    assert by_name["everyday"] == pytest.approx(3 * by_name["weapons"], abs=2)
    assert min(constitution.shares(1)) == 1


def test_S3_1_a_longer_draw_from_templates_begins_with_the_shorter_one():
    constitution = load_constitution(RECIPES / "nano.yaml")
    kind = constitution.classes[0]
    few, many = draw(constitution, kind, 5, 3), draw(constitution, kind, 40, 3)
    assert many[:5] == few and len(set(many)) == 40
    assert draw(constitution, kind, 5, 4) != few
    assert not any("{" in text for text in many)
