"The whole chain on a subset, from the command line to the answers of the endpoint: params/ci.yaml, as CI runs it."

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, free_port, running

STAGES = ("1_train", "2_test", "3_wrap", "4_deploy")


class Workplace:
    "A state folder, and the commands that are run in it."

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {"TEXTRELAY_HOME": str(home)}

    def textrelay(self, *args: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, "-m", "textrelay.cli", *args], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=1200)
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = Workplace(tmp_path_factory.mktemp("chain"))
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(place.env)  # whichever store an earlier test has named
    yield place
    for endpoint in json.loads(place.textrelay("endpoints", "--json").stdout):
        place.textrelay("endpoints", endpoint["name"], "--delete")
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def chain(workplace):
    started = time.monotonic()
    done = workplace.textrelay("run", "params/ci.yaml", "--json")
    print(f"chain on a subset: {time.monotonic() - started:.0f} s")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def url(chain):
    return chain["results"]["deploy"]["url"]


def curl(url: str, *args: str) -> dict:
    done = subprocess.run(["curl", "-s", "--fail-with-body", *args, f"{url}/invocations"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout)


def test_one_parent_and_four_children_with_all_that_traces_them(workplace, chain):
    from textrelay.exchange import experiment, store

    client = store()
    runs = client.search_runs([experiment()], order_by=["attributes.start_time ASC"])
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == chain["run_id"]]
    assert [r.info.run_name for r in children] == list(STAGES) and len(runs) == 5
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for run in children:
        name, tags = run.info.run_name, run.data.tags
        files = {f.path for folder in ("notebook", "figures") for f in client.list_artifacts(run.info.run_id, folder)}
        assert {f"notebook/{name}.ipynb", f"notebook/{name}.html"} < files and any(f.startswith("figures/") for f in files), files
        assert run.info.status == "FINISHED" and tags["textrelay.verdict"] == "PASS" and run.data.params and run.data.metrics
        assert tags["textrelay.notebook"] == tags["mlflow.source.name"] == f"nbs/stages/{name}.ipynb"
        assert tags["textrelay.commit"] == tags["mlflow.source.git.commit"] == (head or "unknown")
        assert tags["textrelay.params_digest"].startswith("sha256:") and tags["textrelay.lock"].startswith("sha256:")
    digest = chain["results"]["train"]["dataset_digest"]
    assert {r.data.tags["textrelay.data_digest"] for r in children} == {digest}
    inputs = [i.dataset.name for r in children for i in r.inputs.dataset_inputs]
    assert inputs.count("replies") >= 3, "train, test and wrap record the data set as an input"
    assert "train.validation_f1_macro" in client.get_run(chain["run_id"]).data.metrics


def test_the_executed_notebook_is_a_report(workplace, chain):
    from mlflow.artifacts import download_artifacts

    for stage, figures in (("train", 1), ("test", 4), ("wrap", 1), ("deploy", 1)):
        folder = Path(download_artifacts(run_id=chain["results"][stage]["run_id"], artifact_path="notebook"))
        notebook = json.loads(next(folder.glob("*.ipynb")).read_text())
        outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
        assert not [o for o in outputs if o["output_type"] == "error"]
        assert sum("image/png" in o.get("data", {}) for o in outputs) >= figures
        page = next(folder.glob("*.html")).read_text()
        assert "data:image/png;base64" in page and "<h2" in page


def test_a_raw_message_by_curl_as_it_is_printed(chain, workplace, url):
    sample = chain["results"]["deploy"]["sample_mail"]
    answer = curl(url, "-H", "Content-Type: message/rfc822", "--data-binary", f"@{sample}")
    row = answer["predictions"][0]
    assert (row["status"], row["reason"], row["label"]) == ("suppressed", "automatic:out_of_office", None)
    assert answer["model"]["release"] == chain["results"]["wrap"]["release"] and answer["model"]["version"] == chain["results"]["wrap"]["version"]
    assert row["prediction_id"].startswith(answer["model"]["release"].removeprefix("sha256:")[:12] + "-")
    assert answer["model"]["run_id"] == chain["results"]["wrap"]["run_id"] and answer["model"]["commit"]


def test_smoke_asks_the_golden_rows_of_what_the_registry_names(workplace, chain):
    asked = json.loads(workplace.textrelay("smoke", "params/ci.yaml", "--json").stdout)
    assert asked["release"] == chain["results"]["wrap"]["release"] and asked["golden"] >= 12
    assert "nothing is in force" in workplace.textrelay("smoke", "params/production.yaml", code=1).stderr


def test_a_human_reply_is_scored(url):
    body = json.dumps([{"id": "a", "subject": "Re: hello", "text": "Sounds good, does Thursday at 4 work for a call?"}, {"text": "   "}])
    scored, empty = curl(url, "-H", "Content-Type: application/json", "-d", body)["predictions"]
    assert set(scored) == {"id", "label", "score", "scores", "status", "reason", "cached", "prediction_id"}
    assert scored["id"] == "a" and abs(sum(scored["scores"].values()) - 1) < 1e-6
    assert set(scored["scores"]) == {"positive", "objection", "referral", "unsubscribe", "other"}
    assert (empty["status"], empty["reason"]) == ("suppressed", "empty")


def test_the_registered_model_answers_like_the_endpoint(workplace, chain, url):
    import mlflow
    import pandas as pd

    from textrelay.exchange import store

    store()
    texts = ["Please take me off your list.", "We already use somebody else for this, sorry."]
    rows = curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(texts))["predictions"]
    table = mlflow.pyfunc.load_model("models:/reply-intent@staging").predict(pd.DataFrame({"text": texts}))
    assert table.label.tolist() == [r["label"] for r in rows]
    for ours, theirs in zip(table.scores, rows, strict=True):
        assert ours == pytest.approx(theirs["scores"], abs=1e-5)


def test_score_a_file_with_what_the_endpoint_runs(workplace, chain, tmp_path):
    from textrelay.metrics import evaluate, read_scores

    workplace.textrelay("score", "data/replies/test.jsonl", str(tmp_path / "scores.csv"), "--model", "reply-intent-staging", "--label", "intent")
    scores = read_scores(tmp_path / "scores.csv")
    assert len(scores.ids) == 207 and scores.model == chain["results"]["wrap"]["release"]
    assert evaluate(scores, intervals=0)["f1_macro"] == pytest.approx(chain["results"]["wrap"]["f1_macro"], abs=1e-6)


def test_what_did_not_change_is_not_run_again(workplace, chain):
    same = workplace.textrelay("run", "params/ci.yaml", "--json")
    assert json.loads(same.stdout)["results"] == chain["results"] and json.loads(same.stdout)["run_id"] != chain["run_id"]
    for stage, result in chain["results"].items():
        assert f"{stage}: nothing changed since run {result['run_id']}" in same.stderr
    workplace.textrelay("endpoints", chain["results"]["deploy"]["endpoint"], "--delete")
    again = workplace.textrelay("run", "params/ci.yaml", "--json")
    assert again.stderr.count("nothing changed") == 3 and "deploy: endpoint moved since run" in again.stderr
    assert json.loads(again.stdout)["results"]["deploy"]["release"] == chain["results"]["wrap"]["release"]


def test_wrapped_again_it_is_the_same_release_and_meets_its_champion(workplace, chain):
    before = json.loads(workplace.textrelay("endpoints", "--json").stdout)
    done = workplace.textrelay("run", "params/ci.yaml", "--set", "wrap.champion=staging", "--json")
    assert done.stderr.count("nothing changed") == 2, "train and test; another champion concerns the later stages alone"
    again = json.loads(done.stdout)["results"]
    assert again["wrap"]["release"] == chain["results"]["wrap"]["release"] and again["wrap"]["run_id"] != chain["results"]["wrap"]["run_id"]
    assert "the candidate is the champion itself" in again["wrap"]["why"] and "no champion" not in again["wrap"]["why"]
    assert [(e["status"], e["url"]) for e in json.loads(workplace.textrelay("endpoints", "--json").stdout)] == [("running", e["url"]) for e in before]


@pytest.mark.soak  # as long as the first chain; in make test, training and wrapping are held against themselves apart
def test_the_whole_chain_again_is_the_same_release(workplace, chain):
    again = json.loads(workplace.textrelay("run", "params/ci.yaml", "--force", "--json").stdout)["results"]
    assert again["train"]["run_id"] != chain["results"]["train"]["run_id"] and again["train"]["model_digest"] == chain["results"]["train"]["model_digest"]
    assert again["wrap"]["release"] == chain["results"]["wrap"]["release"], "same commit, data, parameters, threads: same digest"


def test_publish_and_consume_from_the_command_line(workplace, tmp_path):
    (tmp_path / "words.csv").write_text("word\nyes\n")
    done = json.loads(workplace.textrelay("publish", str(tmp_path / "words.csv"), "words", "--kind", "vocabulary", "--alias", "approved", "--json").stdout)
    assert done["version"] == "1" and done["kind"] == "vocabulary"
    workplace.textrelay("consume", "words@approved", "--into", str(tmp_path / "copy"))
    assert (tmp_path / "copy/words.csv").read_text() == "word\nyes\n"
    assert "words@1  vocabulary" in workplace.textrelay("consume").stdout
    assert "exists already" in workplace.textrelay("consume", "words@1", "--into", str(tmp_path / "copy"), code=1).stderr


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a folder: its URL, and the folder."
    (pages := tmp_path / "pages").mkdir()
    port = free_port()
    words = f"-m jupyterlab --no-browser --allow-root --port {port} --IdentityProvider.token=t --ServerApp.root_dir={pages} --LabApp.news_url=None"
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}  # not the settings of whoever runs the test
    with running([sys.executable, *words.split()], f"http://127.0.0.1:{port}/api/status?token=t", tmp_path / "log", env):
        yield f"http://127.0.0.1:{port}", pages


def test_jupyterlab_shows_a_library_notebook_and_an_executed_stage_with_its_plots(chain, lab, tmp_path):
    if not (browser := shutil.which("chromium")):
        pytest.skip("no chromium on PATH; the test looks at JupyterLab in a real browser (Debian: chromium)")
    from mlflow.artifacts import download_artifacts
    from PIL import Image

    url, pages = lab
    shutil.copy(ROOT / "nbs/lib/11_metrics.ipynb", pages)
    shutil.copy(download_artifacts(run_id=chain["results"]["test"]["run_id"], artifact_path="notebook/2_test.ipynb"), pages)
    expected = {"11_metrics.ipynb": (["Labels and probabilities of a set of rows", "class Scores"], 0), "2_test.ipynb": (["Where it errs", "macro F1"], 4)}
    for name, (shown, plots) in expected.items():
        look = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,6500",
                "--virtual-time-budget=30000"]
        page = f"{url}/lab/tree/{name}?token=t&reset"
        dom = subprocess.run([*look, "--dump-dom", page], capture_output=True, text=True, timeout=120).stdout
        assert all(text in dom for text in shown) and dom.count("<img src=\"data:image/png") >= plots, f"{name}: {len(dom)} characters"
        subprocess.run([*look, f"--screenshot={tmp_path / 'seen.png'}", page], capture_output=True, timeout=120)
        colours = Image.open(tmp_path / "seen.png").convert("RGB").getcolors(2**24)
        assert len(colours) > 200 and max(n for n, _ in colours) < 0.97 * sum(n for n, _ in colours), f"{name}: an empty page"
