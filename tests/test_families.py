"""Every family that people bring (tiny, random weights, its own kind of tokenizer): fitted, logged, and the same probabilities wherever it is loaded."""

import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT, free_port, running

TEXTS = ["Sounds good, call me on Tuesday.", "Please take me off your list!", "no", "We are happy with what we have, thanks. " * 12, "", "Wer ist das? Ñandú 🦆"]
LABELS = ["yes", "stop", "stop", "no", "no", "yes"]
SIZE: dict[str, Any] = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # family -> kind of tokenizer, size of the network
    "Bert": ("wordpiece", SIZE),
    "Roberta": ("bytes", {**SIZE, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "Albert": ("pieces", {**SIZE, "embedding_size": 16, "pad_token_id": 0}),
    "XLNet": ("pieces", {"vocab_size": 200, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "pad_token_id": 0}),
    "DistilBert": ("wordpiece", {"vocab_size": 200, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}),
    "Electra": ("wordpiece", {**SIZE, "embedding_size": 16}),
}


def lines() -> list[str]:
    return [json.loads(line)["text"] for line in (ROOT / "data/replies/train.jsonl").read_text(encoding="utf-8").splitlines()[:200]]


def tokenizer_of(family: str, kind: str) -> Any:
    "The family's own tokenizer class around a small vocabulary that was learnt from the sample."
    import tokenizers
    import transformers

    own = getattr(transformers, f"{family}Tokenizer")
    if kind == "bytes":
        learnt = tokenizers.ByteLevelBPETokenizer()
        learnt.train_from_iterator(lines(), vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        model = json.loads(learnt.to_str())["model"]
        return own(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    if kind == "pieces":
        learnt = tokenizers.SentencePieceUnigramTokenizer()
        special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<sep>", "<cls>", "<mask>"]
        learnt.train_from_iterator(lines(), vocab_size=190, special_tokens=special, unk_token="<unk>")
        return own(vocab=[tuple(p) for p in json.loads(learnt.to_str())["model"]["vocab"]], **({"unk_id": 1} if family == "XLNet" else {}))
    learnt = tokenizers.BertWordPieceTokenizer()
    learnt.train_from_iterator(lines(), vocab_size=200, show_progress=False)
    return own(vocab=learnt.get_vocab())


@pytest.fixture(scope="session", params=FAMILIES)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    "A classifier of the family after two epochs on six texts."
    import torch
    import transformers

    from textrelay.classifier import TransformerClassifier

    kind, size = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    tokenizer = tokenizer_of(request.param, kind)
    config = getattr(transformers, f"{request.param}Config")(**{**size, "vocab_size": max(size["vocab_size"], len(tokenizer)), "initializer_range": 0.3})
    getattr(transformers, f"{request.param}Model")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return TransformerClassifier(str(folder), epochs=2, batch_size=2, learning_rate=1e-3, head_learning_rate=1e-2, quiet=True, threads=2).fit(TEXTS, LABELS)


def test_a_fitted_family_tells_texts_apart_and_cuts_long_ones(fitted: Any) -> None:
    P = fitted.predict_proba([*TEXTS, "word " * 3000])
    assert P.shape == (7, 3) and np.allclose(P.sum(axis=1), 1) and np.isfinite(P).all()
    assert np.abs(P[0] - P[1]).max() > 1e-4, "random weights, but not a constant answer"
    assert np.abs(fitted.predict_proba(TEXTS[::-1])[::-1] - P[:6]).max() < 1e-5, "a row depends on its neighbours"


def test_a_fine_tuned_family_is_fitted_again_with_other_labels(fitted: Any, tmp_path: Path) -> None:
    from textrelay.classifier import TransformerClassifier

    labels = ["yes", "no"] * 3
    clf = TransformerClassifier(str(fitted.save(tmp_path / "three")), epochs=1, quiet=True, threads=1).fit(TEXTS, labels)
    loaded = TransformerClassifier.load(clf.save(tmp_path / "two"))
    assert np.array_equal(loaded.predict_proba(TEXTS), clf.predict_proba(TEXTS)) and list(loaded.classes_) == ["no", "yes"]


def test_onnx_and_torch_agree(fitted: Any, tmp_path: Path) -> None:
    from textrelay.classifier import export_onnx
    from textrelay.runtime import ExportedClassifier

    exported = ExportedClassifier(export_onnx(fitted, tmp_path / "runtime"))
    texts = [*TEXTS, "word " * 3000]
    assert np.abs(exported.predict_proba(texts) - fitted.predict_proba(texts)).max() < 1e-5
    again = export_onnx(fitted, tmp_path / "again")
    assert (again / "model.onnx").read_bytes() == (tmp_path / "runtime/model.onnx").read_bytes(), "the same network, other bytes"


def test_flavor_round_trip_native_pyfunc_and_alias(fitted: Any, state: Path) -> None:
    import mlflow
    import pandas as pd

    from textrelay import exchange, flavor

    expected = fitted.predict_proba(TEXTS)
    with mlflow.start_run(experiment_id=exchange.experiment("families")):
        logged = flavor.log_model(fitted, "model", registered_model_name="family")
    exchange.store().set_registered_model_alias("family", "champion", "1")
    for uri in (logged.model_uri, "models:/family@champion"):
        native = flavor.load_model(uri)
        assert np.abs(native.predict_proba(TEXTS) - expected).max() < 1e-5 and list(native.classes_) == list(fitted.classes_)
        answers = mlflow.pyfunc.load_model(uri).predict(pd.DataFrame({"text": TEXTS}))
        got = np.array([[a[c] for c in fitted.classes_] for a in answers["scores"]])
        assert np.abs(got - expected).max() < 1e-5


@pytest.mark.soak  # a server a family: a minute and more
def test_mlflow_models_serve(fitted: Any, tmp_path: Path) -> None:
    from textrelay import flavor

    flavor.save_model(fitted, tmp_path / "model")
    port = free_port()
    words = f"-m mlflow models serve -m {tmp_path / 'model'} --env-manager local --host 127.0.0.1 --port {port} --workers 1".split()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with running([sys.executable, *words], f"http://127.0.0.1:{port}/ping", tmp_path / "log", env):
        body = json.dumps({"dataframe_split": {"columns": ["text"], "data": [[t] for t in TEXTS]}}).encode()
        question = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
        answers = json.load(urllib.request.urlopen(question, timeout=60))["predictions"]
    got = np.array([[a["scores"][c] for c in fitted.classes_] for a in answers])
    assert np.abs(got - fitted.predict_proba(TEXTS)).max() < 1e-5


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Any:
    "A Spark of this machine alone: two workers in one Java process."
    if not shutil.which("java"):
        pytest.skip("no java on PATH; Spark needs one (Debian: default-jre-headless)")
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    place = tmp_path_factory.mktemp("spark")
    settings = {"spark.ui.enabled": "false", "spark.sql.warehouse.dir": str(place), "spark.local.dir": str(place), "spark.driver.host": "127.0.0.1",
                "spark.driver.bindAddress": "127.0.0.1", "spark.sql.shuffle.partitions": "2", "spark.sql.execution.arrow.maxRecordsPerBatch": "4"}
    session = SparkSession.builder.master("local[2]").appName("families").config(map=settings).getOrCreate()
    yield session
    session.stop()


def test_spark_udf(fitted: Any, spark: Any, state: Path, tmp_path: Path) -> None:
    import mlflow
    from pyspark.sql.functions import col

    from textrelay import exchange, flavor

    exchange.experiment("spark")
    flavor.save_model(fitted, tmp_path / "model")
    udf = mlflow.pyfunc.spark_udf(spark, str(tmp_path / "model"), env_manager="local")
    table = spark.createDataFrame(list(enumerate(TEXTS)), ["row", "text"]).repartition(2)
    rows = sorted(table.withColumn("answer", udf(col("text"))).collect(), key=lambda row: row["row"])
    got = np.array([[row["answer"]["scores"][c] for c in fitted.classes_] for row in rows])
    assert np.abs(got - fitted.predict_proba(TEXTS)).max() < 1e-5
    assert [row["answer"]["label"] for row in rows] == list(fitted.predict(TEXTS)) and {row["answer"]["status"] for row in rows} == {"scored"}
