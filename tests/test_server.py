"""A team's store: an `mlflow server` on PostgreSQL that keeps the artifacts itself, chosen by MLFLOW_TRACKING_URI alone.

Two whole chains run on it at the same time, from one checkout, with one registered model and one new data set between them: whatever both
want to be the first to make, they want at once. A third chain, which trains nothing, loses its server in the middle of a stage."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import nbformat
import pytest

from conftest import ROOT, free_port, running
from test_project import WORDS
from textrelay.core import digest_file, write_table

STAGES = ["1_train", "2_test", "3_wrap", "4_deploy"]
GIVES_UP_S = 40  # from the server's end to the command's: one request that is tried three times within 6 s, and a loaded machine

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))  # Debian's; not on PATH

pytestmark = pytest.mark.skipif(not POSTGRES, reason="no PostgreSQL in /usr/lib/postgresql (Debian: postgresql); the MLflow server of these tests needs it")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    "URL of an empty PostgreSQL database that listens on a socket of its own. It refuses to run as root."
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # pytest's folders are closed to other users, and too long for a socket's name
    identity: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        identity |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def program(name: str, *args: str) -> None:
        with open(folder / "log", "ab") as log:  # the server keeps it, so it must not be a pipe
            done = subprocess.run([POSTGRES[-1].with_name(name), "-D", folder / "data", *args], stdout=log, stderr=log, timeout=60, **identity)
        assert done.returncode == 0, (folder / "log").read_text()

    try:
        program("initdb", "--username=mlflow", "--auth=trust", "--no-sync")
        program("pg_ctl", "start", "--wait", "-o", f"-F -k {folder} -c listen_addresses=")
        try:
            yield f"postgresql+psycopg2://mlflow@/postgres?host={folder}"
        finally:
            program("pg_ctl", "stop", "--mode=immediate")
    finally:
        shutil.rmtree(folder)


class Server:
    "Where it is, and where it keeps the artifacts: nobody but the server knows that folder."

    def __init__(self, folder: Path, database: str) -> None:
        port = free_port()
        self.url, self.artifacts, self.log = f"http://127.0.0.1:{port}", folder / "artifacts", folder / "log"
        options = {"backend-store-uri": database, "artifacts-destination": self.artifacts, "host": "127.0.0.1", "port": port, "workers": 1}
        self.command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts", *(f"--{k}={v}" for k, v in options.items())]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
        self.env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen processes that are of no use here
        self.ends = contextlib.ExitStack()

    def start(self) -> None:
        self.process = self.ends.enter_context(running(self.command, f"{self.url}/health", self.log, self.env))

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    "A server that is up, and MLflow's clients in this process pointed to it."
    from textrelay.exchange import environment

    server = Server(tmp_path_factory.mktemp("server"), database)
    with server.ends, environment(MLFLOW_TRACKING_URI=server.url):
        server.start()
        yield server


@dataclass
class Project:
    "A project with a small data set, and the command line in it."

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "nbs/stages").mkdir(parents=True)
        (self.folder / "MLproject").touch()
        self.state = self.folder / ".textrelay"
        rows = [{"text": " ".join(words[(n + k) % len(words)] for k in range(n % 7 + 2)) + f" {n}", "label": label}
                for label, words in ((k, v.split()) for k, v in WORDS.items()) for n in range(60)]
        write_table(self.folder / "replies.jsonl", rows)

    def params(self, name: str, **stages: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(stages))  # JSON is YAML

    def start(self, url: str, *args: str, **env: str) -> subprocess.Popen[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "TEXTRELAY"))}
        command, pipes = [sys.executable, "-m", "textrelay.cli", *args], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.folder, env={**kept, "MLFLOW_TRACKING_URI": url, **env}, **pipes, text=True)


@dataclass
class Outcome:
    "How a command ended."

    code: int
    out: str
    err: str
    took: float  # s


def ended(process: subprocess.Popen[str], timeout: float = 300) -> Outcome:
    started = time.monotonic()
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err, time.monotonic() - started)


# Two chains at the same time


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    from textrelay.classifier import tiny_model
    from textrelay.targets import LocalTarget

    place = Project(tmp_path_factory.mktemp("two") / "project")
    shutil.copytree(ROOT / "nbs/stages", place.folder / "nbs/stages", ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    tiny_model(place.folder / "tiny")
    any_score = [{"metric": "f1_macro", "at_least": 0.001}]
    for n in (1, 2):
        train = {"dataset": "replies.jsonl", "model": "tiny", "max_length": 16, "epochs": 1, "threads": 1, "seed": n}
        deploy = {"alias": f"chain-{n}", "endpoint": f"chain-{n}", "requests": 3}  # in one environment the second who promotes is refused
        rest = {"test": {"gates": any_score}, "wrap": {"name": "shared", "after": ["Stamp"], "gates": any_score}, "deploy": deploy}
        place.params(f"chain{n}.yaml", train=train, **rest)
    yield place
    for endpoint in LocalTarget(place.state).endpoints():
        LocalTarget(place.state).delete(endpoint.name)


@pytest.fixture(scope="module")
def chains(place: Project, server: Server) -> list[dict[str, Any]]:
    "What the two printed."
    both = [place.start(server.url, "run", f"chain{n}.yaml", "--json") for n in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(ended, both))
    assert [o.code for o in outcomes] == [0, 0], "\n".join(o.err for o in outcomes)
    print(f"two chains on a server: {max(o.took for o in outcomes):.0f} s")
    return [json.loads(o.out) for o in outcomes]


@pytest.mark.soak
def test_both_pass_with_one_parent_and_four_children_each(chains: list[dict[str, Any]]) -> None:
    from textrelay.exchange import experiment, store

    runs = store().search_runs([experiment()], order_by=["attributes.start_time ASC"])
    assert len(runs) == 10 and {r.info.status for r in runs} == {"FINISHED"} and {r.data.tags["textrelay.verdict"] for r in runs} == {"PASS"}
    for n, chain in enumerate(chains, 1):
        parent, = (r for r in runs if r.info.run_id == chain["run_id"])
        children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == chain["run_id"]]
        assert parent.info.run_name == f"chain{n}" and [r.info.run_name for r in children] == STAGES
        assert [r.info.run_id for r in children] == [r["run_id"] for r in chain["results"].values()]
        assert children[0].data.params["seed"] == str(n) and children[3].data.params["endpoint"] == f"chain-{n}"


@pytest.mark.soak
def test_what_both_made_at_once_is_there_once(chains: list[dict[str, Any]]) -> None:
    from textrelay.exchange import experiment, publications, store

    assert [e.name for e in store().search_experiments()].count("textrelay") == 1
    published, = publications("replies")
    assert {c["results"]["train"]["dataset"] for c in chains} == {"replies@1"} and published.version == "1"
    assert {r.info.status for r in store().search_runs([experiment("textrelay-exchange")])} == {"FINISHED"}
    for chain in chains:
        inputs = store().get_run(chain["results"]["train"]["run_id"]).inputs.dataset_inputs
        assert [i.dataset.name for i in inputs] == ["replies"]


@pytest.mark.soak
def test_versions_and_endpoints_are_not_mixed_up(chains: list[dict[str, Any]], place: Project) -> None:
    from textrelay.registry import entries
    from textrelay.targets import LocalTarget, request

    wraps = [c["results"]["wrap"] for c in chains]
    assert {w["version"] for w in wraps} == {"1", "2"} and wraps[0]["release"] != wraps[1]["release"]
    assert {(e.version, e.release, e.run_id) for e in entries("shared")} == {(w["version"], w["release"], w["run_id"]) for w in wraps}
    for n, (chain, endpoint) in enumerate(zip(chains, LocalTarget(place.state).endpoints(), strict=True), 1):
        wrap = chain["results"]["wrap"]
        assert (endpoint.name, endpoint.status, endpoint.release) == (f"chain-{n}", "running", wrap["release"])
        assert endpoint.facts["run_id"] == wrap["run_id"] and endpoint.facts["version"] == wrap["version"]
        row, = request(endpoint.url, ["yes let us meet next week"])
        assert row["status"] == "scored" and row["prediction_id"].startswith(wrap["release"].removeprefix("sha256:")[:12])


@pytest.mark.soak
def test_all_is_on_the_server_and_nothing_of_it_in_the_checkout(chains: list[dict[str, Any]], place: Project, server: Server) -> None:
    from mlflow.artifacts import download_artifacts

    from textrelay.exchange import store
    from textrelay.flavor import model_folder

    assert not list(place.folder.rglob("mlflow.db")) and not list(place.folder.rglob("mlruns")) and not (place.state / "artifacts").exists()
    for chain in chains:
        for name, result in zip(STAGES, chain["results"].values(), strict=True):
            run = store().get_run(result["run_id"])
            assert run.info.artifact_uri.startswith("mlflow-artifacts:/") and str(server.artifacts) not in json.dumps(run.to_dictionary())
            copy = Path(download_artifacts(run_id=run.info.run_id, artifact_path=f"notebook/{name}.ipynb"))
            stored, = server.artifacts.glob(f"*/{run.info.run_id}/artifacts/notebook/{name}.ipynb")
            assert digest_file(copy) == digest_file(stored)
        bundle = model_folder(chain["results"]["wrap"]["bundle_uri"])
        assert (bundle / "golden.jsonl").is_file() and server.artifacts not in bundle.parents
    assert "mlflow-artifacts/artifacts" in server.log.read_text(), "artifacts came by HTTP"


def test_many_publish_the_same_at_the_same_moment(server: Server, state: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from textrelay.exchange import environment, experiment, publications, publish, store

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    write_table(tmp_path / "words.csv", [{"word": "yes"}])
    together, client = Barrier(4, timeout=20), store()
    run = client.create_run(experiment("crowd")).info.run_id

    def one(n: int) -> str:
        together.wait()
        return publish(tmp_path / "words.csv", "words").reference

    with environment(MLFLOW_RUN_ID=run), ThreadPoolExecutor(4) as pool:  # all of them for one run: four first namings of the data set
        assert set(pool.map(one, range(4))) == {"words@1"}
    assert [p.reference for p in publications("words")] == ["words@1"]
    assert [i.dataset.name for i in client.get_run(run).inputs.dataset_inputs] == ["words"]


def test_many_runs_are_the_first_to_name_a_data_set(server: Server, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.entities import Dataset, DatasetInput

    from textrelay.exchange import _log_input, experiment, store

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    together, client = Barrier(4, timeout=20), store()
    runs = [client.create_run(experiment("first")).info.run_id for _ in range(4)]
    inputs = [DatasetInput(Dataset(f"new-{n}", "0" * 32, "textrelay", "{}"), []) for n in range(10)]  # ten chances to meet

    def one(run: str) -> None:
        for new in inputs:
            together.wait()
            _log_input(client, run, new)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, runs))
    assert [len(client.get_run(run).inputs.dataset_inputs) for run in runs] == [10] * 4


# The server dies

METADATA = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
NOTEBOOKS = {
    "1_train.ipynb": (
        "dataset = ...",
        "from textrelay import exchange\nfrom textrelay.stages import Stage\nstage = Stage.begin('train')\n"
        "published, _ = exchange.obtain(dataset)\nstage.finish(dataset=published.reference, dataset_digest=published.digest)",
    ),
    "2_test.ipynb": (
        "train = ...\nscore = 0.0",
        "import os, time\nfrom textrelay.stages import Stage\nstage = Stage.begin('test')\nprint('so far')\n"
        "open('asleep', 'w').close()\nwhile os.path.exists('asleep'): time.sleep(0.05)",
        "stage.log({'score': score})\nstage.finish()",
    ),
}


@dataclass
class Death:
    "A chain whose server was killed while its second stage worked, and how it went on."

    stopped: Outcome
    found: list[tuple[str, str]]  # names and states of its runs, as the server had them when it was back
    left: list[str]               # what the state folder kept for it
    resumed: Outcome
    runs: list[Any]               # at the end, the parent first
    work: list[Path]


def kill_in_the_middle(place: Project, server: Server, process: subprocess.Popen[str]) -> None:
    "Kill the server while the notebook works, and let the notebook go on to where it needs the server."
    asleep = place.folder / "asleep"
    deadline = time.monotonic() + 120
    while not asleep.exists():
        assert process.poll() is None and time.monotonic() < deadline, ended(process, 1).err
        time.sleep(0.05)
    server.kill()
    asleep.unlink()


@pytest.fixture(scope="module")
def death(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Death:
    from textrelay.exchange import experiment, store

    place = Project(tmp_path_factory.mktemp("death") / "project")
    for name, (parameters, *cells) in NOTEBOOKS.items():
        made = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, cells)]
        nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=METADATA), place.folder / "nbs/stages" / name)
    place.params("dies.yaml", train={"dataset": "replies.jsonl"}, test={})

    def runs() -> list[Any]:
        found = store().search_runs([experiment()], order_by=["attributes.start_time ASC"])
        parent, = (r for r in found if r.info.run_name == "dies")
        return [parent, *(r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id)]

    process = place.start(server.url, "run", "dies.yaml", "--set", "test.score=0.5", MLFLOW_HTTP_REQUEST_MAX_RETRIES="2")
    kill_in_the_middle(place, server, process)
    stopped = ended(process)
    server.start()
    found, left = [(r.info.run_name, r.info.status) for r in runs()], sorted(p.name for p in place.state.glob("work/*/notebook/*"))
    command, *words = shlex.split(stopped.err.splitlines()[-1].rpartition(": ")[2])  # as it was printed
    assert command == "textrelay", stopped.err
    process = place.start(server.url, *words, "--json", MLFLOW_HTTP_REQUEST_MAX_RETRIES="6")  # up to two minutes
    kill_in_the_middle(place, server, process)  # once more, and this time it is back soon
    server.start()
    resumed = ended(process)
    print(f"a chain stopped {stopped.took:.0f} s after its server; resumed, it ended {resumed.took:.0f} s after the server was back")
    return Death(stopped, found, left, resumed, runs(), list(place.state.glob("work/*")))


@pytest.mark.soak
def test_a_killed_server_ends_in_one_clear_message(death: Death, server: Server) -> None:
    stopped, parent = death.stopped, death.runs[0]
    assert stopped.code == 1 and stopped.out == "" and stopped.took < GIVES_UP_S
    steps = [line for line in stopped.err.splitlines() if line.startswith("[")]
    assert steps[0].startswith("[1/2] train") and steps[-1] == "[2/2] test …"
    assert [line for line in stopped.err.splitlines() if line not in steps] == [
        f"error: the MLflow server at {server.url} does not answer ([Errno 111] Connection refused); the chain stopped",
        f"  what passed is kept; once it answers, go on with: textrelay run dies.yaml --from {parent.info.run_id} --set test.score=0.5",
    ]


@pytest.mark.soak
def test_the_resumed_chain_goes_on_where_it_stopped_and_waits_for_a_server_that_is_back_soon(death: Death) -> None:
    assert death.resumed.code == 0, death.resumed.err
    done = json.loads(death.resumed.out)
    parent, train, cut_off, again = death.runs
    assert done["run_id"] == parent.info.run_id and {s: r["verdict"] for s, r in done["results"].items()} == {"train": "PASS", "test": "PASS"}
    assert [r["run_id"] for r in done["results"].values()] == [train.info.run_id, again.info.run_id], "the training that passed is not done again"
    assert again.data.metrics == {"score": 0.5} and again.data.params["score"] == "0.5"


@pytest.mark.soak
def test_no_run_is_left_running_and_the_cut_off_notebook_is_kept(death: Death) -> None:
    from textrelay.exchange import store

    assert death.found == [("dies", "RUNNING"), ("1_train", "FINISHED"), ("2_test", "RUNNING")], "a dead server was told nothing"
    assert death.left == ["2_test.ipynb"]
    parent, train, cut_off, again = death.runs
    assert [r.info.status for r in death.runs] == ["FINISHED", "FINISHED", "KILLED", "FINISHED"]
    assert parent.data.tags["textrelay.verdict"] == again.data.tags["textrelay.verdict"] == "PASS"
    assert "was killed" in cut_off.data.tags["textrelay.failure"] and "textrelay.verdict" not in cut_off.data.tags
    assert {f.path for f in store().list_artifacts(cut_off.info.run_id, "notebook")} == {"notebook/2_test.ipynb", "notebook/2_test.html"}
    assert death.work == []


def test_a_server_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    place, url = Project(tmp_path / "project"), f"http://127.0.0.1:{free_port()}"
    place.params("one.yaml", train={})
    outcome = ended(place.start(url, "run", "one.yaml"))
    assert (outcome.code, outcome.out) == (1, "") and outcome.took < 20, "importing, not waiting"
    assert outcome.err == (f"error: the MLflow server at {url} does not answer ([Errno 111] Connection refused); "
                           "start it, correct MLFLOW_TRACKING_URI, or unset it to keep runs in this checkout\n")
    assert not list(place.state.rglob("mlflow.db"))
