"""Whatever goes wrong ends in one clear message, a non-zero exit and a FAILED run with its notebook; the next run just works.

Each fault spoils a small project and runs the real command line on it. Its train stage is the real notebook up to the checked data set
and then hands over: what is tested here comes before, around and after training. The faults of a group share a project and a state
folder, in which the next good run has to work; two groups run at a time, for there are two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from conftest import ROOT
from textrelay.core import write_table

LABELS = ("positive", "objection", "unsubscribe")
ROWS = [{"text": f"message number {n}", "label": LABELS[n % 3]} for n in range(120)]
GOOD = {"dataset": "replies.jsonl", "model": "tiny"}  # the model is never read
LIMIT_S = 180  # of one run; a loaded machine needs a multiple of its usual 10
STOP_S = 20    # from a signal to the end of the process


@dataclass
class Outcome:
    "How one run ended."

    code: int
    out: str
    err: str
    window: tuple[int, int]  # when it ran, in ms since 1970
    took: float              # s; for a stopped run since the signal
    left: list[str]          # what it should have put away


@dataclass
class Place:
    "A small project, its state folder, and the command line in it."

    folder: Path
    stored: dict[Path, bytes] = field(default_factory=dict)  # files of publications as they were published

    def __post_init__(self) -> None:
        self.project, self.state, self.temporary, self.runtime = (self.folder / n for n in ("project", "state", "tmp", "jupyter"))
        for path in (self.project / "nbs/stages", self.state, self.temporary, self.runtime):
            path.mkdir(parents=True)
        (self.project / "MLproject").touch()
        self.asleep = self.folder / "asleep"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {
            "TEXTRELAY_HOME": str(self.state), "TMPDIR": str(self.temporary), "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "ASLEEP": str(self.asleep),
        }
        self.reset()

    def reset(self) -> None:
        "Make everything good again, as whoever read the message would."
        shutil.rmtree(self.state / "cache", ignore_errors=True)
        for path, content in self.stored.items():
            path.write_bytes(content)
        write_table(self.project / "replies.jsonl", ROWS)
        self.train()
        for name in ("1_train.ipynb", "2_test.ipynb"):
            nbformat.write(short(nbformat.read(ROOT / "nbs/stages" / name, as_version=4), name), self.notebook(name))

    def train(self, without: str = "", **changes: Any) -> None:
        "Write the params file."
        values = {k: v for k, v in {**GOOD, **changes}.items() if k != without}
        self.params(train=values)

    def params(self, **stages: dict[str, Any]) -> None:
        (self.project / "params.yaml").write_text(json.dumps(stages))  # JSON is YAML

    def notebook(self, name: str = "1_train.ipynb") -> Path:
        return self.project / "nbs/stages" / name

    def edit(self, change: Callable[[list[Any]], Any]) -> None:
        "Change the cells of the train notebook."
        content = nbformat.read(self.notebook(), as_version=4)
        change(content.cells)
        nbformat.write(content, self.notebook())

    def cell(self, source: str) -> None:
        "Put a cell before the last one of the train notebook."
        self.edit(lambda cells: cells.insert(-1, nbformat.v4.new_code_cell(source)))

    def published(self) -> Path:
        "The stored file of replies@1."
        if not self.stored:
            self.textrelay("publish", "replies.jsonl", "replies")
            path, = self.state.glob("artifacts/**/content/replies.jsonl")
            self.stored[path] = path.read_bytes()
        return next(iter(self.stored))

    def textrelay(self, *args: str, stop: signal.Signals | None = None, once: Path | None = None) -> Outcome:
        "Run a command; with `stop`, send it that signal once a file is there, or a cell of its notebook sleeps."
        before = set(self.project.rglob("*"))
        command, pipes = [sys.executable, "-m", "textrelay.cli", *args], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        began, started = time.time(), time.monotonic()
        runner = subprocess.Popen(command, cwd=self.project, env=self.env, **pipes, text=True, start_new_session=True)
        try:
            if stop:
                while not (once or self.asleep).exists():
                    assert runner.poll() is None and time.monotonic() < started + LIMIT_S, "it never got that far"
                    time.sleep(0.02)
                started = time.monotonic()
                runner.send_signal(stop)  # to the runner alone, as a scheduler does
            out, err = runner.communicate(timeout=LIMIT_S)
        finally:
            runner.kill()
        took = time.monotonic() - started
        return Outcome(runner.returncode, out, err, (int(began * 1000), int(time.time() * 1000) + 1), took, self.left(before))

    def left(self, before: set[Path]) -> list[str]:
        "What should not be there when a run has ended: work folders, temporary files, sockets and kernels."
        hidden = [p for p in self.state.rglob("*") if p.name.startswith(".")]
        new = set(self.project.rglob("*")) - before
        files = [*self.state.glob("work/*"), *hidden, *self.temporary.iterdir(), *self.runtime.iterdir(), *new]
        kernels = [f"process {p.pid}" for p in psutil.process_iter(["cmdline"]) if str(self.runtime) in " ".join(p.info["cmdline"] or [])]
        return [str(p.relative_to(self.folder)) for p in files] + kernels


HAND_OVER = {
    "1_train.ipynb": "stage.finish(dataset=published.reference, dataset_digest=published.digest, labels=data.labels)",
    "2_test.ipynb": "from textrelay.gates import judge\nstage.finish(judge(gates, {'f1_macro': 0.5}))",
}


def short(notebook: Any, name: str) -> Any:
    "The real parameters cell and the way to the data, without what imports torch or trains."
    parameters, begin = [c for c in notebook.cells if c.cell_type == "code"][:2]
    kept = ["from textrelay.stages", "stage ="]
    if name == "1_train.ipynb":
        kept += ["from textrelay import", "published,", "reading =", "data ="]
    lines = [line.partition(", metrics")[0] for line in begin.source.splitlines() if line.startswith(tuple(kept))]
    assert len(lines) == len(kept), f"{name} begins in another way than these tests expect:\n{begin.source}"
    begin.source = "\n".join(lines)
    notebook.cells = [parameters, begin, nbformat.v4.new_code_cell(HAND_OVER[name])]
    return notebook


@dataclass
class Fault:
    "One thing that is wrong, and what the message has to say about it."

    group: str
    spoil: Callable[[Place], Any]
    says: tuple[str, ...]
    stop: signal.Signals | None
    runs: bool  # whether a kernel is started, and so a run of the stage


FAULTS: dict[str, Fault] = {}


Spoil = Callable[[Place], Any]


def fault(group: str, *says: str, runs: bool = True, stop: signal.Signals | None = None) -> Callable[[Spoil], Spoil]:
    def note(spoil: Spoil) -> Spoil:
        FAULTS[spoil.__name__] = Fault(group, spoil, says, stop, runs)
        return spoil
    return note


@fault("project", "params.yaml: train: unknown parameters ['epohcs']", "1_train.ipynb declares", "did you mean ['epochs']?", runs=False)
def a_misspelt_parameter(place: Place) -> None:
    place.train(epohcs=1)


@fault("project", "params.yaml: test: unknown parameters ['gaets']", "2_test.ipynb declares", "did you mean ['gates']?", runs=False)
def a_misspelt_parameter_of_a_later_stage(place: Place) -> None:
    place.params(train=GOOD, test={"gaets": []})


@fault("project", "params.yaml: test: gate {'metrc': 'f1_macro', 'at_least': 0.5}", "unknown keys ['metrc']; did you mean 'metric'?", runs=False)
def a_misspelt_gate_of_a_later_stage(place: Place) -> None:
    place.params(train=GOOD, test={"gates": [{"metrc": "f1_macro", "at_least": 0.5}]})


@fault("project", "params.yaml: train: parameters ['dataset'] are missing", "1_train.ipynb needs them", runs=False)
def a_missing_parameter(place: Place) -> None:
    place.train(without="dataset")


@fault("project", "params.yaml: train: parameter 'epochs' is 'three' (str)", "expects int such as 3", runs=False)
def a_parameter_of_another_type(place: Place) -> None:
    place.train(epochs="three")


@fault("project", "1_train.ipynb: code cell 3 assigns the parameters ['epochs'] again", "use other names", runs=False)
def a_cell_that_assigns_a_parameter_again(place: Place) -> None:
    place.cell("epochs = 1")


@fault("project", "1_train.ipynb: 0 cells are tagged 'parameters', expected exactly one", "tag the cell with the defaults", runs=False)
def a_notebook_that_lost_its_tag(place: Place) -> None:
    place.edit(lambda cells: cells[0].metadata.clear())


@fault("project", "1_train.ipynb: code cell 3 is not Python", runs=False)
def a_cell_that_is_not_python(place: Place) -> None:
    place.cell("learning rate = 3")


@fault("project", "stage train failed: cell 3 of 1_train.ipynb: KeyError: 'loss'", "its notebook is in the MLflow run")
def a_notebook_that_fails_half_way(place: Place) -> None:
    place.cell("stage.log({'loss': 1.0})\n(stage.folder / 'half.csv').write_text('id,sc')\nprint('so far')\n{}['loss']")


@fault("data", "IntegrityError: replies@1", "replies.jsonl")
def a_tampered_publication(place: Place) -> None:
    place.train(dataset="replies@1")
    path = place.published()
    path.write_bytes(path.read_bytes().replace(b"positive", b"Positive"))
    shutil.rmtree(place.state / "cache", ignore_errors=True)


@fault("data", "IntegrityError: replies@1", "replies.jsonl")
def a_truncated_publication(place: Place) -> None:
    place.train(dataset="replies@1")
    path = place.published()
    path.write_bytes(path.read_bytes()[:-20])
    shutil.rmtree(place.state / "cache", ignore_errors=True)


@fault("data", "replies.jsonl: no column 'label' in every row; it has ['intent', 'text']", "set 'label' to one of them")
def a_missing_column(place: Place) -> None:
    write_table(place.project / "replies.jsonl", [{"text": r["text"], "intent": r["label"]} for r in ROWS])


@fault("data", "replies.jsonl: no rows in it")
def an_empty_file(place: Place) -> None:
    (place.project / "replies.jsonl").write_text("")


@fault("data", "only one label, ['positive']", "a classifier needs two or more")
def data_of_one_class(place: Place) -> None:
    write_table(place.project / "replies.jsonl", [r | {"label": "positive"} for r in ROWS])


@fault("data", "the test part has labels that training never sees: ['referral']", "training has ['objection', 'positive', 'unsubscribe']")
def a_label_that_training_never_sees(place: Place) -> None:
    place.train(dataset="parts")
    parts = {"train": ROWS[:90], "validation": ROWS[90:100], "test": [*ROWS[100:], {"text": "ask my boss", "label": "referral"}]}
    for part, rows in parts.items():
        write_table(place.project / f"parts/{part}.jsonl", rows)


@fault("stop", "stage train failed: cell 3 of 1_train.ipynb: interrupted", "its notebook is in the MLflow run", stop=signal.SIGINT)
def ctrl_c(place: Place) -> None:
    place.cell("import os, time\nopen(os.environ['ASLEEP'], 'w').close()\ntime.sleep(600)")


@fault("stop", "stage train failed: cell 3 of 1_train.ipynb: interrupted", "its notebook is in the MLflow run", stop=signal.SIGTERM)
def a_polite_kill(place: Place) -> None:
    ctrl_c(place)


GROUPS = sorted({f.group for f in FAULTS.values()})


def play(place: Place, names: list[str]) -> dict[str, Outcome]:
    "Each fault, and then the good run, one after the other."
    ended = {}
    for name in names:
        place.reset()
        place.asleep.unlink(missing_ok=True)
        FAULTS[name].spoil(place)
        ended[name] = place.textrelay("run", "params.yaml", stop=FAULTS[name].stop)
    place.reset()
    ended["good"] = place.textrelay("run", "params.yaml")
    return ended


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Place, dict[str, Outcome]]]:
    "Groups that the selected tests need, with how each of their runs ended."
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {v for s in selected if s for v in s.params.values() if isinstance(v, str)}
    wanted = {g: [n for n, f in FAULTS.items() if f.group == g and n in asked] for g in GROUPS}
    places = {g: Place(tmp_path_factory.mktemp(g)) for g, names in wanted.items() if names or g in asked}
    with ThreadPoolExecutor(2) as pool:
        futures = {g: pool.submit(play, place, wanted[g]) for g, place in places.items()}
        return {g: (places[g], f.result()) for g, f in futures.items()}


@pytest.fixture
def ended(request: pytest.FixtureRequest, played: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Outcome:
    "How the run with this fault ended; MLflow's store is the one it wrote to."
    place, outcomes = played[FAULTS[request.param].group]
    look_at(place, monkeypatch)
    return outcomes[request.param]


def look_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTRELAY_HOME", str(place.state))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def runs_of(outcome: Outcome) -> list[Any]:
    "MLflow's runs that began while the command ran, publications included."
    from textrelay.exchange import store

    client = store()
    everywhere = [e.experiment_id for e in client.search_experiments()]
    when = "attributes.start_time >= {} and attributes.start_time <= {}".format(*outcome.window)
    return client.search_runs(everywhere, when, order_by=["attributes.start_time ASC"])


def stages_of(outcome: Outcome) -> list[Any]:
    "The chain's run, and those of its stages."
    return [r for r in runs_of(outcome) if not r.info.run_name.startswith("publish")]


def notebooks_in(run: Any) -> list[Path]:
    from mlflow.artifacts import download_artifacts

    from textrelay.exchange import store

    found = [f.path for f in store().list_artifacts(run.info.run_id, "notebook") if f.path.endswith(".ipynb")]
    return [Path(download_artifacts(run_id=run.info.run_id, artifact_path=path)) for path in found]


each_fault = pytest.mark.parametrize(("ended", "name"), [(n, n) for n in FAULTS], indirect=["ended"], ids=list(FAULTS))


@each_fault
def test_one_clear_message(ended: Outcome, name: str) -> None:
    assert ended.code == 1, ended.err
    lines = ended.err.splitlines()
    message = [n for n, line in enumerate(lines) if line.startswith("error:")]
    assert len(message) == 1, ended.err
    assert all(line.startswith("  ") for line in lines[message[0] + 1:]) and len(lines) - message[0] <= 2, ended.err
    said = "\n".join(lines[message[0]:])
    assert [part for part in FAULTS[name].says if part not in said] == [], said
    assert "Traceback" not in ended.err + ended.out and ended.out == ""


@each_fault
def test_a_failed_run_with_its_notebook(ended: Outcome, name: str) -> None:
    chain, *stages = stages_of(ended)
    assert [r.info.status for r in (chain, *stages)] == ["FAILED"] * (1 + len(stages))
    assert [r.info.run_name for r in stages] == ["1_train"] * FAULTS[name].runs, "what can be known before is refused before anything runs"
    assert chain.data.tags["textrelay.verdict"] == "FAILED" and FAULTS[name].says[0] in chain.data.tags["textrelay.failure"]
    assert all(r.data.tags["mlflow.parentRunId"] == chain.info.run_id for r in stages)
    kept, = notebooks_in((chain, *stages)[-1])
    cells = nbformat.read(kept, as_version=4).cells
    assert kept.name == ("2_test.ipynb" if "later_stage" in name else "1_train.ipynb") and len(cells) >= 2
    shown = {o["ename"] for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"}
    if FAULTS[name].stop:
        assert shown == {"KeyboardInterrupt"}
    if name == "a_notebook_that_fails_half_way":
        assert shown == {"KeyError"} and any("so far" in o.get("text", "") for c in cells for o in c.get("outputs", []))


@each_fault
def test_nothing_half_written_is_left(ended: Outcome, name: str) -> None:
    assert ended.left == []
    assert "RUNNING" not in {r.info.status for r in runs_of(ended)}
    if FAULTS[name].stop:
        assert ended.took < STOP_S


@pytest.mark.parametrize("group", GROUPS)
def test_the_next_run_just_works(played: dict[str, Any], group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, outcomes = played[group]
    look_at(place, monkeypatch)
    good = outcomes["good"]
    assert good.code == 0 and "train PASS" in good.out and "error" not in good.err, good.err
    assert {r.info.status for r in runs_of(good)} == {"FINISHED"} and good.left == []


def test_a_kill_while_the_store_is_made_leaves_a_whole_store_and_no_open_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    look_at(place, monkeypatch)
    killed = place.textrelay("run", "params.yaml", stop=signal.SIGTERM, once=place.state / "mlflow.db")
    assert (killed.code, killed.err, killed.left) == (1, "interrupted\n", []) and killed.took < STOP_S
    chain, = runs_of(killed)
    assert chain.info.status == chain.data.tags["textrelay.verdict"] == "FAILED"


def test_a_refused_gate_ends_with_3_and_goes_on_once_its_rule_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    look_at(place, monkeypatch)
    place.params(train=GOOD, test={"gates": [{"metric": "f1_macro", "at_least": 0.6}]})
    refused = place.textrelay("run", "params.yaml")
    assert refused.code == 3 and "Traceback" not in refused.err and refused.left == []
    message = refused.err[refused.err.index("refused:"):]
    assert "stage test: FAIL" in message and "f1_macro is 0.5" in message and "at least 0.6 is required" in message
    chain, train, test = stages_of(refused)
    assert [r.info.status for r in (chain, train, test)] == ["FINISHED"] * 3, "a refusal is an answer, not a failure"
    assert [r.data.tags["textrelay.verdict"] for r in (chain, train, test)] == ["REFUSED", "PASS", "FAIL"] and notebooks_in(test)

    rule = "test.gates=[{metric: f1_macro, at_least: 0.4}]"
    resumed = place.textrelay("run", "params.yaml", "--from", chain.info.run_id, "--set", rule, "--json")
    assert resumed.code == 0, resumed.err
    done = json.loads(resumed.out)
    assert done["run_id"] == chain.info.run_id
    assert {s: r["verdict"] for s, r in done["results"].items()} == {"train": "PASS", "test": "PASS"}
    assert done["results"]["train"]["run_id"] == train.info.run_id, "the training that passed is not done again"
    again, = stages_of(resumed)
    assert again.info.run_name == "2_test" and again.data.tags["mlflow.parentRunId"] == chain.info.run_id
