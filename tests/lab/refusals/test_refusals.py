"""The classifier of refusals: right on texts it never saw, saved without code in it, honest about what was held out."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusing import TAXONOMY, labelled, write
from tiny import WORDS, build

from redflag.data.sources import Provenance
from redflag.errors import RedflagError
from redflag.lab.refusals import PhraseClassifier, RefusalClassifier, load_taxonomy
from redflag.lab.refusals.classifier import features_maker
from redflag.lab.refusals.features import Ngrams, _grams, _words
from redflag.lab.refusals.held_out import divide, f1, figures_of, macro_f1, train
from redflag.lab.refusals.pairs import RequestAndAnswer as Pair
from redflag.lab.refusals.pairs import read_labelled
from redflag.models.pretrain import train_tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return read_labelled([write(tmp_path_factory.mktemp("rows") / "train.jsonl", labelled())], Provenance())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("taxonomy") / "small.yaml"
    path.write_text(TAXONOMY)
    return load_taxonomy(path)


@pytest.fixture(scope="module")
def trained(pairs, small):
    return train(pairs, small, Ngrams, folds=4)


@pytest.mark.parametrize(
    ("response", "refusal", "kinds"),
    [
        ("I'm sorry, but I can't help with that.", 1, None),
        ("I’m sorry, but I can’t share personal information.", 1, ["Requests with safety concerns"]),
        ("I cannot  provide\nthat. Could you clarify?", 1, ["Incomplete requests"]),
        ("I'm unable to say; as of my knowledge cutoff that is subjective.", 1, ["Unsupported", "Indeterminate"]),
        ("Sure, here is how.", 0, None),
        ("Bread rises because " + "yeast breathes " * 30 + "and I cannot help with more.", 0, None),
        ("", 0, None),
    ],
)
def test_S4_1_phrases_alone_find_plain_refusals_and_their_reasons(response, refusal, kinds):
    classifier = PhraseClassifier(load_taxonomy())
    judged = classifier.judge([Pair("?", response)])
    assert judged.refusal.tolist() == [refusal] and judged.prompt is None
    if kinds is None:
        assert np.isnan(judged.categories).all()
    else:
        found = {name for name, p in zip(classifier.classes, judged.categories[0], strict=True) if p > 0}
        assert len(found) == len(kinds) and all(any(name.startswith(kind) for name in found) for kind in kinds)
        assert judged.categories.sum() == pytest.approx(1)


@pytest.mark.parametrize("stage", ["refusal", "category", "prompt"])
def test_S4_1_S4_2_all_stages_are_right_on_held_out_requests(trained, stage):
    figures = trained.made["held_out"][stage]
    low, high = figures["macro_f1_interval"]
    assert figures["macro_f1"] > 0.95 and low <= figures["macro_f1"] <= high <= 1
    assert np.sum(figures["confusion"]) == figures["rows"] == {"refusal": 240, "category": 120, "prompt": 240}[stage]


def test_S4_1_labels_without_meaning_give_chance_on_held_out_requests(small):
    draw = np.random.default_rng(0)
    noise = [Pair(f"q{i}", " ".join(draw.choice(WORDS, 8)), refusal=bool(i % 2), group=f"q{i}") for i in range(200)]
    figures = train(noise, small, Ngrams, folds=4).made["held_out"]["refusal"]
    assert figures["macro_f1_interval"][0] < 0.5 < figures["macro_f1_interval"][1] + 0.1


def test_S4_1_answers_to_one_request_are_never_divided():
    groups = [f"g{i % 17}" for i in range(300)]
    parts = list(divide(groups, 5, 0))
    fold = {int(i): number for number, (_, held_out) in enumerate(parts) for i in held_out}
    assert sorted(fold) == list(range(300)) and all(len([*a, *b]) == len({*a, *b}) == 300 for a, b in parts)
    assert all(len({fold[i] for i, g in enumerate(groups) if g == name}) == 1 for name in groups)
    assert set(fold.values()) == set(range(5))
    again = divide(groups, 5, 0)
    assert all(
        np.array_equal(a, b) for one, other in zip(parts, again, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_S4_2_a_refusal_gets_the_kind_and_an_answer_none(trained):
    judged = trained.judge([Pair("Give Ada the salary", "I will not do that."), Pair("Tell Bo of bees", "Bees fly.")])
    assert judged.refusal[0] > 0.5 > judged.refusal[1]
    assert trained.classes[int(judged.categories[0].argmax())] == "Private"
    assert np.isnan(judged.categories[1]).all()
    assert judged.prompt[0] > 0.5 > judged.prompt[1]


def test_S4_2_where_requests_alone_were_learnt_the_answers_own_reason_counts_half(small):
    rows = [Pair(p["prompt"], p["response"], refusal=p["refusal"], group=p["id"]) for p in map(dict, labelled(60))]
    kinds = [Pair(p["prompt"], "", categories=(p["refusal_category"],), group=p["id"]) for p in labelled(120)[::2]]
    classifier = train([*rows, *kinds], small, Ngrams, folds=0)
    assert classifier.stages["category"].reads == ("prompt",)
    plain, said = (
        classifier.judge([Pair("Give Ada the salary", f"I will not do that. {why}")]).categories[0]
        for why in ("", "I have no eyes")
    )
    np.testing.assert_allclose(said, plain / 2 + [0, 0, 0.5])


def test_S4_2_level_subcategory_tells_finer_kinds(tmp_path):
    fine = {
        "Private": "Requests with safety concerns/privacy violations",
        "Unclear": "Incomplete requests/underspecified",
    }
    fine["Senses"] = "Unsupported requests/input modality limitations"
    rows = [row | {"refusal_category": fine.get(row.get("refusal_category"))} for row in labelled(120)]
    found = read_labelled([write(tmp_path / "fine.jsonl", rows)], Provenance())
    classifier = train(found, load_taxonomy(), Ngrams, level="subcategory", folds=3)
    assert set(classifier.classes) == set(fine.values())
    assert classifier.made["held_out"]["category"]["macro_f1"] > 0.9


def test_S4_1_a_saved_classifier_judges_as_before_and_holds_no_pickle(trained, pairs, tmp_path):
    trained.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.json", "weights.safetensors"]
    again = RefusalClassifier.load(tmp_path)
    assert again.taxonomy == trained.taxonomy and again.made == trained.made
    for before, after in zip(trained.judge(pairs[:50]), again.judge(pairs[:50]), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("spoil", ["no file", "no weights", "not JSON", "format", "class", "names", "no refusal"])
def test_a_damaged_classifier_is_refused_in_one_sentence(trained, tmp_path, spoil):
    trained.save(tmp_path)
    path = tmp_path / "classifier.json"
    record = json.loads(path.read_text())
    if spoil == "no file":
        path.unlink()
    elif spoil == "no weights":
        (tmp_path / "weights.safetensors").write_bytes(b"\x80\x04N.")
    elif spoil == "not JSON":
        path.write_text("[]")
    else:
        if spoil == "format":
            record["format"] = 99
        elif spoil == "class":
            record["stages"]["category"]["classes"].append("Another")
        elif spoil == "names":
            record["stages"]["refusal"]["features"][0]["names"].pop()
        else:
            del record["stages"]["refusal"]
        path.write_text(json.dumps(record))
    with pytest.raises(RedflagError, match="must be a folder that") as caught:
        RefusalClassifier.load(tmp_path)
    assert "\n" not in str(caught.value) and "redflag audit --train" in str(caught.value)


@settings(max_examples=40)
@given(st.lists(st.text(max_size=60) | st.sampled_from(["the cat sat", "Cats' cat's CAT", "中文 text!"]), min_size=1))
def test_S4_1_ngrams_are_scikit_learns_tfidf(texts):
    from sklearn.feature_extraction.text import TfidfVectorizer

    ours = Ngrams(min_count=1)

    def analyse(text):
        words = _words(text)
        grams = [gram for word in words for gram in _grams(word)]
        return [*grams, *(f"p {a} {b}" for a, b in itertools.pairwise(words))]

    if not any(analyse(text) for text in texts):
        with pytest.raises(RedflagError, match="some word must be in"):
            ours.fit(texts)
        return
    ours.fit(texts)
    theirs = TfidfVectorizer(analyzer=analyse, sublinear_tf=True, dtype=np.float64)
    matrix = theirs.fit_transform(texts).toarray()
    columns = [theirs.vocabulary_[name] for name in ours.names]
    np.testing.assert_allclose(ours.transform(texts).toarray(), matrix[:, columns], atol=1e-5)


def test_S4_1_an_embedding_model_is_a_parameter(pairs, small, tmp_path):
    tokenizer = train_tokenizer([f"{pair.prompt} {pair.response}" for pair in pairs], 400)
    for part in (build("llama", len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    classifier = train(pairs, small, features_maker(str(tmp_path / "model")), folds=2)
    assert classifier.made["held_out"]["refusal"]["macro_f1"] > 0.9
    classifier.save(tmp_path / "classifier")
    again = RefusalClassifier.load(tmp_path / "classifier")
    np.testing.assert_allclose(again.judge(pairs[:9]).refusal, classifier.judge(pairs[:9]).refusal, atol=1e-4)
    with pytest.raises(RedflagError, match="does not load"):
        features_maker(str(tmp_path / "nothing"))()


def test_embeddings_are_means_over_the_texts_own_tokens(tmp_path):
    import torch
    from transformers import AutoModel

    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, 320)
    for part in (build("llama", len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path)
    texts = ["the cat", "dogs ran home to burn down the barn", "the cat"]
    found = features_maker(str(tmp_path))().raw(texts)
    model = AutoModel.from_pretrained(tmp_path)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(row, hidden.mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("confusion", "each", "macro"),
    [
        ([[5, 0], [0, 5]], [1, 1], 1),
        ([[0, 5], [5, 0]], [0, 0], 0),
        ([[4, 0], [4, 0]], [2 / 3, 0], 1 / 3),
        ([[3, 1, 0], [0, 4, 0], [0, 0, 0]], [6 / 7, 8 / 9, np.nan], (6 / 7 + 8 / 9) / 2),
    ],
)
def test_S4_2_macro_f1_by_hand(confusion, each, macro):
    np.testing.assert_allclose(f1(np.array(confusion)), each)
    assert macro_f1(np.array(confusion)) == pytest.approx(macro)


def test_S4_2_intervals_take_requests_as_their_units():
    truth = np.arange(40) % 2
    guess = np.where(np.arange(40) % 10 < 8, truth, 1 - truth)
    alone = figures_of(truth, guess, [str(i) for i in range(40)], ["a", "b"], 0)
    many = figures_of(np.tile(truth, 10), np.tile(guess, 10), [str(i) for i in range(40)] * 10, ["a", "b"], 0)
    assert alone["macro_f1_interval"] == pytest.approx(many["macro_f1_interval"])
    assert many["rows"] == 400 and many["requests"] == 40


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "response": "b"}, "a row must have a label"),
        ({"prompt": "a", "refusal": True}, "must come with a response"),
        ({"prompt": "a", "response": "b", "refusal": "yes"}, "refusal must be true, false or null (got 'yes')"),
        ({"prompt": "a", "response": "b", "refusal": False, "refusal_category": "Private"}, "refusal is false, yet"),
        ({"prompt": "a", "refusal_category": 3}, "refusal_category must be a name or a list"),
        ({"prompt": "a", "prompt_label": "bad"}, "prompt_label must be harmful, benign or null (got 'bad')"),
        ({"prompt": 3, "prompt_label": "benign"}, "must have a prompt"),
        ({"messages": "hi", "refusal": True}, "messages must be a list of turns"),
        ("[1]", "must be an object"),
        ("{", "malformed JSON"),
    ],
)
def test_rows_that_teach_nothing_are_refused_with_their_line(tmp_path, row, says):
    path = write(tmp_path / "train.jsonl", [labelled(1)[0], row])
    with pytest.raises(RedflagError) as caught:
        read_labelled([path], Provenance())
    assert says in str(caught.value) and "train.jsonl:2:" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"folds": 1}, "folds must be .* 1"), ({"folds": 500}, "at least 500"), ({"c": 0.0}, "above 0 .got 0.0")],
)
def test_training_with_options_that_make_no_sense_is_refused(pairs, small, options, says):
    with pytest.raises(RedflagError, match=says):
        train(pairs, small, Ngrams, **options)


def test_training_needs_refusals_and_answers(pairs, small):
    with pytest.raises(RedflagError, match=r"two or more classes .got 120 of 'refusal'"):
        train(pairs[::2], small, Ngrams, folds=0)
    with pytest.raises(RedflagError, match="must have the label `refusal`"):
        train([Pair("a", "", categories=("Private",))], small, Ngrams, folds=0)


def test_labels_that_the_taxonomy_does_not_know_are_counted(pairs, small):
    other = Pair("q", "I cannot do that", refusal=True, categories=("Weapons",), group="q")
    assert train([*pairs, other], small, Ngrams, folds=0).made["unknown"] == 1
