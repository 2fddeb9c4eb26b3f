"""The notebooks of nbs/explore from top to bottom, made small by their parameters, with a tiny network instead of the pretrained one."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest

from textrelay import exchange, metrics
from textrelay.classifier import TransformerClassifier, tiny_model
from textrelay.core import project_root, read_table

EXPLORE = project_root(__file__) / "nbs" / "explore"
SMALL = {"rows": 60, "epochs": 1}
INTENTS = ["objection", "other", "positive", "referral", "unsubscribe"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("explore")
        patch.setenv("TEXTRELAY_HOME", str(home))
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # else somebody's own kernel called python3 would run another environment
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        teach_tiny(home)
        yield home


def teach_tiny(home: Path) -> None:
    "A tiny network that has seen the replies: like a pretrained one it is sure of some answers, so that a floor has something to tell apart."
    rows = read_table(project_root(__file__) / "data" / "replies" / "train.jsonl")
    words = Counter(re.findall(r"\w+", " ".join(row["text"] for row in rows)))
    blank = tiny_model(home / "tiny", " ".join(word for word, _ in words.most_common(800)))
    clf = TransformerClassifier(blank, epochs=12, learning_rate=2e-3, dropout=0.0, precision="float32", threads=1, quiet=True)
    clf.fit([row["text"] for row in rows], [row["intent"] for row in rows]).save(home / "tiny-taught")


def executed(name: str, state: Path) -> Any:
    "The notebook as papermill leaves it; an error in a cell is raised."
    papermill.execute_notebook(
        str(EXPLORE / name), str(state / name), parameters={**SMALL, "model": str(state / "tiny-taught")},
        cwd=str(EXPLORE), kernel_name="python3", progress_bar=False, start_timeout=120,
    )
    return nbformat.read(state / name, as_version=4)


@pytest.fixture(scope="module")
def quickstart(state: Path) -> Any:
    return executed("quickstart.ipynb", state)


@pytest.fixture(scope="module")
def compare(state: Path) -> Any:
    return executed("compare.ipynb", state)


def outputs(notebook: Any) -> list[Any]:
    return [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]


def printed(notebook: Any) -> str:
    return "".join(o.text for o in outputs(notebook) if o.output_type == "stream" and o.name == "stdout")


def images(notebook: Any) -> int:
    return sum("image/png" in o.get("data", {}) for o in outputs(notebook))


def runs_of(experiment: str) -> dict[str, Any]:
    client = exchange.store()
    found = client.get_experiment_by_name(experiment)
    assert found, f"no experiment {experiment!r}"
    return {r.info.run_name: r for r in client.search_runs([found.experiment_id])}


def test_committed_without_outputs() -> None:
    notebooks = sorted(EXPLORE.glob("*.ipynb"))
    assert [n.name for n in notebooks] == ["compare.ipynb", "quickstart.ipynb", "rehearsal.ipynb"]
    for path in notebooks:
        code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert code and not [c for c in code if c.outputs or c.execution_count], f"{path.name}: clear its outputs before you commit"
        assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1


def test_quickstart_shows_what_it_promises(quickstart: Any) -> None:
    assert not [o for o in outputs(quickstart) if o.output_type == "error"] and images(quickstart) == 4
    text = printed(quickstart)
    assert "Out of Office: rota software" in text and "suppressed: automatic:out_of_office" in text
    assert "RE: Thursday?" in text and "only what is importable" in text and "the same labels: True" in text and "textrelay ui" in text
    tables = "".join(o.data["text/html"] for o in outputs(quickstart) if "text/html" in o.get("data", {}))
    coverage = [float(v) for v in re.findall(r'col1"\s*>([\d.]+)</td>\s*<td[^>]*col2"', tables)][-7:]
    assert coverage == sorted(coverage, reverse=True) and coverage[0] > coverage[-1], "a higher floor answers fewer messages"


def test_quickstart_run_is_in_mlflow(quickstart: Any) -> None:
    runs = runs_of("explore")
    assert list(runs) == ["quickstart"]
    run = runs["quickstart"]
    assert run.info.status == "FINISHED" and run.info.run_id in printed(quickstart) and int(run.data.params["rows"]) in range(58, 63)
    assert run.data.metrics["test.rows"] == 207 and 0 < run.data.metrics["test.coverage"] <= 1
    assert run.data.metrics["test.f1_macro.low"] <= run.data.metrics["test.f1_macro"] <= run.data.metrics["test.f1_macro.high"]
    assert {f"test.f1.{c}" for c in INTENTS} <= set(run.data.metrics)
    models = exchange.store().search_logged_models([run.info.experiment_id])
    assert [(m.name, m.source_run_id) for m in models] == [("quickstart", run.info.run_id)]


def test_compare_logs_a_run_for_each_model(compare: Any) -> None:
    assert not [o for o in outputs(compare) if o.output_type == "error"] and images(compare) == 3
    runs = runs_of("compare")
    assert set(runs) == {"TF-IDF + linear SVM", "frozen embedding", "fine-tuned transformer"}
    client = exchange.store()
    tables = {}
    for name, run in runs.items():
        values = run.data.metrics
        assert run.info.status == "FINISHED" and run.info.run_id in printed(compare) and run.data.params["dataset"] == "replies@1"
        assert values["rows"] == 207 and values["coverage"] == 1 and values["ms.mean"] > 0 and values["seconds.training"] > 0
        assert [i.dataset.name for i in run.inputs.dataset_inputs] == ["replies"]
        tables[name] = metrics.read_scores(client.download_artifacts(run.info.run_id, "scores.csv"))
        assert tables[name].classes == INTENTS and metrics.evaluate(tables[name])["f1_macro"] == pytest.approx(values["f1_macro"])
    for name in ("frozen embedding", "fine-tuned transformer"):
        gain = metrics.compare(tables[name], tables["TF-IDF + linear SVM"])
        assert runs[name].data.metrics["gain_over_svm"] == pytest.approx(gain["difference"])
        assert runs[name].data.metrics["gain_over_svm.low"] == pytest.approx(gain["low"]) and gain["low"] <= gain["high"]
    assert "gain_over_svm" not in runs["TF-IDF + linear SVM"].data.metrics
    assert runs["frozen embedding"].data.params["C"] in ("0.01", "0.1", "1", "10", "100")
