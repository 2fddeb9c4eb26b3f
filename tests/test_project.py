"""The project as MLflow runs it: in its folder, and by a tag that a git server serves.

Both use the repository's own MLproject and stage notebooks on a tiny model and a small table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, free_port
from textrelay.core import write_table

WORDS = {"positive": "yes meet call next week", "objection": "no price budget we use", "unsubscribe": "stop remove who is this"}
PARAMS = "train: {dataset: replies.jsonl, model: tiny, max_length: 16, epochs: 1, threads: 1}\n"


def git(folder: Path, *args: str) -> str:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "init.defaultBranch=main")
    command = ["git", *identity, "-C", str(folder), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def state_of(repo: Path) -> dict[str, str]:
    "What a run by tag must not touch."
    asks = {"HEAD": "rev-parse HEAD", "branch": "symbolic-ref HEAD", "status": "status --porcelain", "refs": "show-ref",
            "shallow": "rev-parse --is-shallow-repository"}
    return {name: git(repo, *command.split()) for name, command in asks.items()}


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A repository whose tag v1 is one commit behind its branch."
    from textrelay.classifier import tiny_model

    repo = tmp_path_factory.mktemp("served") / "repo"
    shutil.copytree(ROOT / "nbs/stages", repo / "nbs/stages", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "MLproject", repo)
    (repo / "params").mkdir()
    (repo / "params/quickstart.yaml").write_text(PARAMS)  # what MLproject runs unless told otherwise
    (repo / "params/other.yaml").write_text(PARAMS.replace("epochs: 1", "epochs: 2"))
    (repo / ".gitignore").write_text(".textrelay/\n")
    tiny_model(repo / "tiny")
    rows = [{"text": " ".join(words[(n + k) % len(words)] for k in range(n % 7 + 2)) + f" {n}", "label": label}
            for label, words in ((k, v.split()) for k, v in WORDS.items()) for n in range(40)]
    write_table(repo / "replies.jsonl", rows)
    git(repo, "init", "-q")
    git(repo, "add", ".")
    git(repo, "commit", "-q", "-m", "first")
    git(repo, "tag", "v1")
    (repo / "params/quickstart.yaml").write_text(PARAMS.replace("epochs: 1", "epochs: many"))  # would fail
    git(repo, "commit", "-q", "-a", "-m", "second")
    return repo


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    "MLflow's store and textrelay's state below tmp_path, for the command and for this process."
    for name in [n for n in os.environ if n.startswith("MLFLOW")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TEXTRELAY_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return dict(os.environ)


def mlflow_run(env: dict[str, str], folder: Path, uri: str, *args: str) -> str:
    "Run a project from an empty store; what MLflow said."
    from textrelay.exchange import experiment

    experiment()  # as `textrelay` made it, with its artifacts in the state folder
    command = [sys.executable, "-m", "mlflow", "run", uri, "-e", "train", "--env-manager", "local", "--experiment-name", "textrelay", *args]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def parent_and_child() -> tuple[Any, Any]:
    "The one run that `mlflow run` made and its one stage; there is no third one."
    from textrelay.exchange import experiment, store

    runs = store().search_runs([experiment()])
    parent, = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    child, = (r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id)
    assert len(runs) == 2 and {r.info.status for r in runs} == {"FINISHED"} and child.info.run_name == "1_train"
    return parent, child


def artifacts_of(run: Any, folder: str) -> set[str]:
    from textrelay.exchange import store

    return {f.path for f in store().list_artifacts(run.info.run_id, folder)}


def test_mlflow_run_in_a_checkout_logs_to_the_run_that_mlflow_made(repo: Path, env: dict[str, str]) -> None:
    from mlflow import MlflowClient

    said = mlflow_run(env, repo, ".", "-P", "params=params/other.yaml")
    parent, child = parent_and_child()
    assert f"Run (ID '{parent.info.run_id}') succeeded" in said
    assert parent.data.tags["mlflow.project.entryPoint"] == "train" and parent.data.params == {"params": "params/other.yaml"}
    assert parent.data.tags["textrelay.verdict"] == child.data.tags["textrelay.verdict"] == "PASS" and child.data.params["epochs"] == "2"
    assert "train.validation_f1_macro" in parent.data.metrics and "validation_f1_macro" in child.data.metrics
    assert artifacts_of(child, "notebook") == {"notebook/1_train.ipynb", "notebook/1_train.html"}
    models = MlflowClient().search_logged_models([child.info.experiment_id])
    assert [(m.name, m.source_run_id) for m in models] == [("trained", child.info.run_id)]
    assert git(repo, "status", "--porcelain") == "", "a run leaves nothing behind in the checkout"


@pytest.fixture
def server(repo: Path) -> Iterator[str]:
    "URL of the repository as `git daemon` serves it."
    if not (Path(git(repo, "--exec-path")) / "git-daemon").is_file():
        pytest.skip("git has no daemon here (Debian's git package has it)")
    port = free_port()
    daemon = Path(git(repo, "--exec-path")) / "git-daemon"  # itself, not `git daemon`: the wrapper would leave it running
    serve = [str(daemon), f"--base-path={repo.parent}", "--export-all", "--listen=127.0.0.1", f"--port={port}", "--reuseaddr"]
    process = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"git://127.0.0.1:{port}/repo"
    try:
        until = time.monotonic() + 20
        while (asked := subprocess.run(["git", "ls-remote", url], capture_output=True, text=True, timeout=20)).returncode:
            assert process.poll() is None and time.monotonic() < until, asked.stderr
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def test_a_served_tag_runs_without_touching_the_checkout(repo: Path, env: dict[str, str], server: str, tmp_path: Path) -> None:
    before, elsewhere = state_of(repo), tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert before["status"] == "" and before["shallow"] == "false" and before["HEAD"] != git(repo, "rev-parse", "v1")
    mlflow_run(env, elsewhere, server, "-v", "v1")
    assert state_of(repo) == before
    parent, child = parent_and_child()
    tagged = git(repo, "rev-parse", "v1^{commit}")
    assert {r.data.tags[f"{who}.commit"] for r in (parent, child) for who in ("textrelay", "mlflow.source.git")} == {tagged}
    assert child.data.tags["textrelay.tag"] == parent.data.tags["textrelay.tag"] == "v1"
    assert child.data.tags["textrelay.dirty"] == "false" and child.data.params["epochs"] == "1"
    assert list(elsewhere.iterdir()) == [], "all that it makes is in the store and the state folder"
