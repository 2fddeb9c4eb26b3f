"""scikit-learn's own tools and checks on `TransformerClassifier`."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from textrelay.classifier import TransformerClassifier, tiny_model

BINS = [f"f{column}b{step}" for column in range(10) for step in range(-4, 5)]


class Spelled(TransformerClassifier):
    "scikit-learn's checks bring matrices of numbers: each number becomes a word, the rest is the class as it is."

    def fit(self, X: Any, y: Any, validation: Any = None) -> TransformerClassifier:
        return super().fit(spelled(X), y, validation)

    def predict_proba(self, X: Any, batch_size: int = 32) -> np.ndarray:
        return super().predict_proba(spelled(X), batch_size)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.string = False, True, False
        return tags


def spelled(X: Any) -> list[str]:
    return [" ".join(f"f{n}b{int(np.clip(round(float(v) * 2), -4, 4))}" for n, v in enumerate(row[:10])) for row in np.asarray(X)]


NUMBERS = "text has no {}; `_texts` says what it expects instead"
NOT_FOR_TEXT = {  # check -> why it does not apply
    "check_n_features_in_after_fitting": NUMBERS.format("number of features"),
    "check_n_features_in": NUMBERS.format("number of features"),
    "check_fit1d": "wants one dimension refused, and that is what a list of texts has",
    "check_fit2d_predict1d": "wants one dimension refused, and that is what a list of texts has",
    "check_estimators_nan_inf": NUMBERS.format("NaN or infinity"),
    "check_estimators_empty_data_messages": NUMBERS.format("zero features; zero rows are refused"),
    "check_estimator_sparse_tag": NUMBERS.format("sparse matrix"),
    "check_estimator_sparse_array": NUMBERS.format("sparse matrix"),
    "check_estimator_sparse_matrix": NUMBERS.format("sparse matrix"),
    "check_classifiers_train": "wants 83 % of blobs right and an error for another number of features; random weights of 2 layers learn too little",
}


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    return ["yes call me next week", "no stop this", "remove me", "yes we meet"] * 9, ["yes", "no", "no", "yes"] * 9


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TransformerClassifier:
    return TransformerClassifier(tiny_model(tmp_path_factory.mktemp("tiny")), epochs=6, learning_rate=5e-3, batch_size=4, threads=1, quiet=True)


def test_the_estimator_checks_that_apply_to_text_pass(tmp_path: Path) -> None:
    clf = Spelled(tiny_model(tmp_path / "tiny", " ".join(BINS)), epochs=1, batch_size=32, threads=1, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = check_estimator(clf, expected_failed_checks=NOT_FOR_TEXT, on_fail=None, on_skip=None)
    failed = {d["check_name"]: str(d["exception"])[:300] for d in done if d["status"] == "failed"}
    passed = {d["check_name"] for d in done if d["status"] == "passed"}
    assert not failed, "\n".join(f"{k}: {v}" for k, v in failed.items())
    assert len(passed) >= 30 and {"check_fit_idempotent", "check_estimators_pickle", "check_methods_subset_invariance"} <= passed
    unneeded = {name for name in NOT_FOR_TEXT if name not in {d["check_name"] for d in done if d["status"] == "xfail"}}
    assert not unneeded, "listed as not for text, but they pass or are gone"


def test_the_checks_that_need_no_data_pass_on_the_class_itself(small: TransformerClassifier) -> None:
    assert {d["status"] for d in check_estimator(small, on_skip=None)} <= {"passed", "skipped"}


def test_clone_grid_search_and_cross_validation(small: TransformerClassifier, texts: tuple[list[str], list[str]]) -> None:
    X, y = texts
    copy = clone(small)
    assert copy.get_params() == small.get_params() and not hasattr(copy, "network_")
    search = GridSearchCV(small, {"learning_rate": [0.0, 5e-3]}, cv=2, scoring="f1_macro").fit(X, y)
    assert search.best_params_ == {"learning_rate": 5e-3} and list(search.predict(X[:4])) == y[:4]
    assert cross_val_score(small, X, y, cv=2).min() > 0.9


def test_pipeline_and_calibration(small: TransformerClassifier, texts: tuple[list[str], list[str]]) -> None:
    X, y = texts
    lower = FunctionTransformer(lambda rows: [row.lower() for row in rows])
    pipe: Pipeline = make_pipeline(lower, small).fit([x.upper() for x in X], y)
    assert list(pipe.predict([X[0].upper()])) == [y[0]] and pipe.score(X, y) > 0.9
    # set_output concerns transformers only; a pipeline that holds a classifier passes it on to them, here to one that returns lists.
    assert list(pipe.set_output(transform="default").predict([X[1]])) == [y[1]]
    calibrated = CalibratedClassifierCV(small, cv=2, ensemble=False).fit(X, y)
    P = calibrated.predict_proba(X)
    assert np.allclose(P.sum(axis=1), 1) and (calibrated.classes_[P.argmax(axis=1)] == np.array(y)).mean() > 0.9


def test_what_is_no_label_is_refused(small: TransformerClassifier) -> None:
    for y, message in ((None, "target y is None"), ([0.1, 0.7], "Unknown label type"), (["a", "a"], "only one class"), (["a"], "same number")):
        with pytest.raises(ValueError, match=message):
            clone(small).fit(["yes", "no"], y)
