"""Subset heads, ReaL's labels and calibration, on cases made by hand."""

import contextlib
import json
import types

import numpy as np
import pytest
from sklearn.metrics import log_loss, top_k_accuracy_score

from vit_jax.evals import EVALS
from vit_jax.evals import classification as lib

HEAD = ("ant", "bee", "cat", "dog")


@pytest.fixture
def random():
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((500, 12))).astype(np.float32)
    label = rng.integers(0, 12, 500)
    logits[np.arange(500), label] += 2
    return logits, label


def score(logits, label, competing=None):
    classes = logits.shape[1]
    competing = np.ones(classes, bool) if competing is None else competing
    return lib.score_logits(logits, np.eye(classes, dtype=bool)[label], competing)


def test_ranks_and_losses_are_those_of_scikit_learn(random, monkeypatch):
    logits, label = random
    found = score(logits, label)
    assert found.top1.mean() == top_k_accuracy_score(label, logits, k=1)
    assert found.top5.mean() == top_k_accuracy_score(label, logits, k=5)
    share = np.exp(logits.astype(float))
    share /= share.sum(1, keepdims=True)
    assert found.loss.mean() == pytest.approx(log_loss(label, share), rel=1e-12)
    np.testing.assert_allclose(found.confidence, share.max(1), rtol=1e-12)
    np.testing.assert_array_equal(found.predicted, logits.argmax(1))


def test_calibration_error_by_its_definition(random):
    logits, label = random
    found = score(logits, label)
    columns = lib.calibration_columns(found.confidence, found.top1)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (found.confidence > low) & (found.confidence <= low + 1 / 15 + 1e-12)
        if inside.any():
            gap = found.top1[inside].mean() - found.confidence[inside].mean()
            error += inside.mean() * abs(gap)
    assert np.abs(columns.mean(0)).sum() == pytest.approx(error, rel=1e-9)
    curve = lib.reliability(found.confidence, found.top1)
    assert sum(row["count"] for row in curve) == 500
    again = sum(r["count"] * abs(r["accuracy"] - r["confidence"]) for r in curve if r["count"])
    assert again / 500 == pytest.approx(error, rel=1e-9)


def test_a_calibrated_model_has_no_error_and_a_sure_one_that_errs_has_all():
    sure = np.full(10, 0.999999)
    assert np.abs(lib.calibration_columns(sure, np.zeros(10)).mean(0)).sum() > 0.99
    half = np.full(10, 0.5)
    assert np.abs(lib.calibration_columns(half, np.arange(10) % 2).mean(0)).sum() == 0


def test_masked_classes_do_not_compete():
    competing, right = lib.matched(HEAD, ("bee", "dog"), "dataset", "x")
    np.testing.assert_array_equal(competing, [False, True, False, True])
    np.testing.assert_array_equal(right, [[False, True, False, False], [False, False, False, True]])
    logits = np.array([[9.0, 1.0, 8.0, 0.0], [9.0, 3.0, 8.0, 2.0]])
    found = lib.score_logits(logits, right[[0, 1]], competing)
    np.testing.assert_array_equal(found.top1, [True, False])
    np.testing.assert_allclose(found.loss, [np.log(1 + np.exp(-1)), np.log(1 + np.exp(1))])
    np.testing.assert_array_equal(found.top5, [True, True])


def test_several_of_the_heads_classes_may_stand_for_one():
    groups = {"insect": ["ant", "bee"], "pet": ["dog"]}
    competing, right = lib.matched(HEAD, ("insect", "pet"), groups, "x")
    np.testing.assert_array_equal(competing, [True, True, False, True])
    logits = np.array([[1.0, 2.0, 9.0, 0.0], [1.0, 2.0, 9.0, 0.0]])
    found = lib.score_logits(logits, right[[0, 1]], competing)
    np.testing.assert_array_equal(found.top1, [True, False])
    share = np.exp([1.0, 2.0, 0.0])
    assert found.loss[0] == pytest.approx(-np.log(share[:2].sum() / share.sum()))


@pytest.mark.parametrize(
    ("classes", "subset", "words"),
    [
        (("bee", "dog"), (), "the dataset lacks 'ant', 'cat'; set subset='dataset'"),
        (("bee", "elk"), (), "the head lacks 'elk', the dataset lacks .* use knn, fewshot"),
        (HEAD[::-1], (), "in another order; set subset='dataset'"),
        (("bee", "elk"), "dataset", "the model's head lacks 'elk'"),
        (("bee", "dog"), ["bee"], "subset lacks 'dog'"),
        (("bee",), "datset", "must be 'dataset', a list or a mapping"),
    ],
)
def test_classes_that_do_not_match_are_named(classes, subset, words):
    with pytest.raises(ValueError, match=words):
        lib.matched(HEAD, classes, subset, "x")


def test_a_head_that_repeats_a_name_is_refused():
    with pytest.raises(ValueError, match="head has 'crane' more than once"):
        lib.matched(("crane", "bee", "crane"), ("bee",), "dataset", "x")


def test_examples_are_called_by_what_tells_them_apart():
    records = [{"filename": name} for name in (b"ant/1.png", b"bee/2.png")]
    assert lib.example_names(records) == ["1", "2"]
    assert lib.example_names([{}, {}]) == [f"{0:012}", f"{1:012}"]
    records.append({"filename": b"bee/1.png"})
    assert lib.example_names(records) == ["ant/1.png", "bee/2.png", "bee/1.png"]
    with pytest.raises(ValueError, match="2 examples of the split are called 'ant/1.png'"):
        lib.example_names([*records, records[0]])


def test_labels_of_examples_whose_names_repeat_go_by_the_whole_name(data_dir, tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps({"1": [3]}))
    scorer = evaluation(data_dir, labels=str(path))
    records = [{"filename": f"{folder}/1.png"} for folder in ("ant", "bee")]
    scorer.loader = lambda split: contextlib.nullcontext(types.SimpleNamespace(source=records))
    given = Given(np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="labels lacks 2 examples, the first: 'ant/1.png'"):
        scorer.measure(given)
    scorer._labels = {"ant/1.png": [3], "bee/1.png": [5]}
    np.testing.assert_array_equal(scorer._targets(given.found)[0].argmax(1), [3, 5])


@pytest.mark.parametrize("name", ["classification", "knn", "linear_probe", "fewshot"])
def test_what_is_not_finite_is_refused(data_dir, name):
    augment = {"name": "none", "size": (8, 8)}
    options = {"dataset": "digits", "data_dir": data_dir, "augment": augment, "batch_size": 360}
    scorer = EVALS[name](**options)
    given = Given(np.zeros(360, np.int32))
    values = np.ones((360, 10), np.float32)
    values[5:8, 3], values[9] = np.nan, np.inf
    given.found.values.update(dict.fromkeys(scorer.wants["test"], values))
    with pytest.raises(
        ValueError, match=rf"{type(scorer).__name__} on digits/.* 4 of 360 examples"
    ):
        scorer.measure(given)


def evaluation(data_dir, **options):
    augment = {"name": "none", "size": (8, 8)}
    return lib.Classification(
        dataset="digits", data_dir=data_dir, augment=augment, batch_size=360, **options
    )


class Given:
    """A reader of logits that say of every image that it is a 3, then a 5, then a 0, …"""

    def __init__(self, label):
        scores = np.zeros((len(label), 10), np.float32)
        scores[:, [3, 5]] = 2.0, 1.0
        index = np.arange(len(label))
        self.found = lib.Features({"logits": scores}, label, index, 0)

    def features(self, evaluation, split):
        return self.found


@pytest.mark.parametrize("by_name", [True, False])
def test_real_labels_count_any_of_the_set_and_leave_out_the_empty(data_dir, tmp_path, by_name):
    label = np.zeros(360, np.int32)
    # 100 without a label, 60 whose set holds a 3, the others' do not.
    sets = [[] for _ in range(100)] + [[7, 3] for _ in range(60)] + [[1]] * 200
    table = sets
    if by_name:
        table = {f"{i:012}": [str(c) for c in each] for i, each in enumerate(sets)}
        plain = evaluation(data_dir)
        names = lib.example_names(plain.loader("test").source)
        table = dict(zip(names, table.values(), strict=True))
    else:  # a list is in the order of the files' names
        plain = evaluation(data_dir)
        names = lib.example_names(plain.loader("test").source)
        table = [table[i] for i in np.argsort(names)]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(table))
    scores = evaluation(data_dir, labels=str(path)).measure(Given(label))
    values = {value.metric: value for value in scores.values}
    assert values["top1"].count == 260
    assert values["top1"].value == pytest.approx(60 / 260)
    assert values["top1"].low < 60 / 260 < values["top1"].high


def test_labels_that_do_not_fit(data_dir, tmp_path):
    path = tmp_path / "real.json"
    with pytest.raises(FileNotFoundError, match="real.json' does not exist"):
        evaluation(data_dir, labels=str(path))
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        evaluation(data_dir, labels=str(path))
    tables = ([[1]] * 7, "7 entries for 360"), ([["elk"]] * 360, "'elk'"), ([[1.5]] * 360, "1.5;")
    for table, words in (*tables, ([[[1]]] * 360, "its number")):
        path.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=words):
            evaluation(data_dir, labels=str(path)).measure(Given(np.zeros(360, np.int32)))


def test_artefacts_of_a_case_by_hand(data_dir):
    label = np.repeat(np.arange(10), 36).astype(np.int32)
    scores = evaluation(data_dir).measure(Given(label))
    values = {value.metric: value.value for value in scores.values}
    assert values["top1"] == pytest.approx(0.1) and values["class_mean"] == pytest.approx(0.1)
    assert values["top5"] == pytest.approx(0.5)  # 3, 5 and, by index, 0, 1, 2
    found = scores.artefacts
    assert found["confusion"]["cells"] == [[c, 3, 36] for c in range(10)]
    assert [row["top1"] for row in found["per_class"]] == [0.0] * 3 + [1.0] + [0.0] * 6
    assert len(found["mistakes"]) == lib.NUM_MISTAKES
    assert found["mistakes"][0]["predicted"] == "3" and found["mistakes"][0]["label"] == "0"
    json.dumps(found, allow_nan=False)
