"""CI's and CD's definitions: of the documented form, only calling what exists, and (make soak) all of their commands run in order on a clean clone."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import ROOT
from textrelay.core import read_json, read_yaml
from textrelay.stages import declared, effective, notebook_of, read_params

CIRCLECI, CONCOURSE = ".circleci/config.yml", "ci/concourse"
PARTS = ("ci", "staging", "production")
# Deployment settings: all of the deploy stage, whose yes is asked for before a build, and what a bundle is served by.
DEPLOYMENT = {("train", "allowed_signers"), ("wrap", "engine")}


def circleci_commands() -> list[str]:
    config = read_yaml(ROOT / CIRCLECI)
    jobs = [job for workflow in config["workflows"].values() for job in workflow["jobs"]]
    assert len(jobs) == len(config["jobs"]), "a job that no workflow runs"
    return [step["run"] for job in jobs for step in config["jobs"][job]["steps"] if "run" in step]


def concourse_jobs() -> dict[str, list[str]]:
    "Commands of each job."
    return {job["name"]: [step["vars"]["command"] for step in job["plan"] if "task" in step] for job in read_yaml(ROOT / CONCOURSE / "pipeline.yml")["jobs"]}


def recipe(target: str) -> list[str]:
    "Commands that a make target consists of, without those of the targets that it needs."
    lines = (ROOT / "Makefile").read_text().split(f"\n{target}:", 1)[1].splitlines()[1:]
    return [line.lstrip("\t@-") for line in lines[: next((n for n, line in enumerate(lines) if not line.startswith("\t")), len(lines))]]


def test_circleci_is_of_its_schema(tmp_path: Path) -> None:
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "check-jsonschema"), "--builtin-schema", "vendor.circle-ci", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done := check(ROOT / CIRCLECI)).returncode == 0, done.stdout
    spoiled = tmp_path / "config.yml"
    spoiled.write_text((ROOT / CIRCLECI).read_text().replace("steps:", "stesp:"))
    assert check(spoiled).returncode == 1


def test_concourse_has_the_documented_fields() -> None:
    schema = read_json(ROOT / "tests/concourse.schema.json")
    pipeline, task = read_yaml(ROOT / CONCOURSE / "pipeline.yml"), read_yaml(ROOT / CONCOURSE / "task.yml")
    of_pipeline = jsonschema.Draft202012Validator(schema)
    of_task = jsonschema.Draft202012Validator({"$defs": schema["$defs"], "$ref": "#/$defs/task"})
    of_pipeline.validate(pipeline)
    of_task.validate(task)
    spoiled = copy.deepcopy(pipeline)
    spoiled["jobs"][0]["plan"][1]["varz"] = {}
    assert not of_pipeline.is_valid(spoiled) and not of_task.is_valid({**task, "input": []}) and not of_task.is_valid({**task, "run": {}})


def test_concourse_refers_to_what_is_there() -> None:
    pipeline = read_yaml(ROOT / CONCOURSE / "pipeline.yml")
    resources, jobs = {r["name"] for r in pipeline["resources"]}, [j["name"] for j in pipeline["jobs"]]
    assert jobs == ["build", "promote", "rollback"]
    for number, job in enumerate(pipeline["jobs"]):
        get, *tasks = job["plan"]
        assert get["get"] in resources and not get.get("trigger"), "every job waits for a person"
        assert set(get.get("passed", [])) <= set(jobs[:number]) and tasks
        assert all((ROOT / t["file"].removeprefix("source/")).is_file() and list(t["vars"]) == ["command"] for t in tasks)
    groups = {j["name"]: j.get("serial_groups") for j in pipeline["jobs"]}
    assert groups["promote"] == groups["rollback"] == ["production"], "not both at once"


def test_secrets_are_only_names() -> None:
    task = read_yaml(ROOT / CONCOURSE / "task.yml")
    assert task["params"] and all(re.fullmatch(r"\(\([a-z_.]+\)\)", v) for v in task["params"].values())
    source, = read_yaml(ROOT / CONCOURSE / "pipeline.yml")["resources"]
    assert source["source"]["private_key"] == "((git.private_key))" and source["source"]["uri"] == "((git.uri))"
    assert "environment" not in json.dumps(read_yaml(ROOT / CIRCLECI))


def _check_command(command: str) -> None:
    words = shlex.split(command)
    assert not set(command) & set(";&|<>$`"), f"{command!r}: more than one command"
    if words[0] == "make":
        target, = words[1:]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no make target {target}"
        for line in recipe(target):
            if line.startswith("textrelay "):
                _check_command(line)
    else:
        from textrelay.cli import main

        assert words[0] == "textrelay", command
        main.commands[words[1]].make_context(words[1], words[2:])  # parses them: unknown options, values and files are errors


def test_every_command_is_a_make_target_or_a_verb_with_those_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pushed, jobs = circleci_commands(), concourse_jobs()
    assert {"make check", "make unit", "make chain"} <= set(pushed) and all(len(commands) >= 2 for commands in jobs.values())
    for command in [*pushed, *(c for commands in jobs.values() for c in commands)]:
        _check_command(command)
    assert read_params("params/ci.yaml")["deploy"]["alias"] == "staging" and any(line == "textrelay run params/ci.yaml" for line in recipe("chain"))
    with pytest.raises(AssertionError, match="no make target"):
        _check_command("make nothing")


def in_force(name: str) -> dict[tuple[str, str], Any]:
    "(stage, parameter) -> value, defaults included."
    wanted = read_params(ROOT / "params" / f"{name}.yaml")
    given = {"train": {}, "test": {}, "wrap": {}}  # results of earlier stages
    out = {}
    for stage, values in wanted.items():
        notebook = notebook_of(stage, ROOT)
        results = {s: r for s, r in given.items() if s in declared(notebook)}
        out |= {(stage, k): v for k, v in effective(notebook, {**results, **values}, name).items()}
    return out


@pytest.mark.parametrize("name", PARTS)
def test_parameters_differ_in_deployment_settings_alone(name: str) -> None:
    "ci also in train.rows: a subset."
    here, production = in_force(name), in_force("production")
    assert here.keys() == production.keys() and len(here) > 30
    different = {key for key in here if here[key] != production[key]}
    allowed = DEPLOYMENT | ({("train", "rows")} if name == "ci" else set())
    assert {key for key in different if key[0] != "deploy"} <= allowed
    assert (("train", "rows") in different) == (name == "ci")
    assert (name == "production") == (here["deploy", "alias"] == "production") and here["wrap", "champion"] == "production"


def test_the_params_file_of_readme_is_whole(tmp_path: Path) -> None:
    written = re.search(r"```yaml\n# params/mine.yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert written
    shutil.copy(ROOT / "params/quickstart.yaml", tmp_path)
    (tmp_path / "mine.yaml").write_text(written[1])
    mine, sample = in_force(str(tmp_path / "mine")), in_force("quickstart")
    for stage, name in (("train", "dataset"), ("train", "name"), ("wrap", "name"), ("wrap", "mail"), ("deploy", "endpoint"), ("deploy", "sample_mail")):
        assert mine[stage, name] != sample[stage, name], f"{stage}.{name} is still the sample's"


def test_a_build_and_production_ask_for_a_yes() -> None:
    staging, production = in_force("staging"), in_force("production")
    assert staging["train", "allowed_signers"] == production["deploy", "allowed_signers"] == "ci/allowed_signers"
    assert staging["deploy", "public_key"] == production["deploy", "public_key"] == "ci/release.pub" and not production["deploy", "same_person"]


class Clone:
    "A clean clone and a machine that knows nothing else."

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "source"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(self.folder)], check=True)
        foreign = ("MLFLOW", "TEXTRELAY", "VIRTUAL_ENV", "PYTHONPATH", "MAKE")
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p).is_relative_to(ROOT))
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)} | {"PATH": path}

    def run(self, *words: str, code: int = 0, **env: str) -> str:
        started = time.monotonic()
        done = subprocess.run(words, cwd=self.folder, env=self.env | env, capture_output=True, text=True, timeout=1800)
        print(f"{time.monotonic() - started:6.0f} s  {words[-1]}")
        assert done.returncode == code, f"{words} -> {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    made = Clone(tmp_path_factory.mktemp("clean"))
    yield made
    made.run("make", "clean")


@pytest.mark.soak
def test_circleci_commands_in_order_on_a_clean_clone(clone: Clone) -> None:
    started = time.monotonic()
    for command in circleci_commands():
        clone.run("bash", "-euo", "pipefail", "-c", command)  # as CircleCI runs it
    assert time.monotonic() - started < 20 * 60
    assert "Executed notebooks" in (clone.folder / "build/release.html").read_text()
    endpoint, = json.loads(clone.run(".venv/bin/textrelay", "endpoints", "--json", TEXTRELAY_HOME=str(clone.folder / "build/chain")))
    assert (endpoint["name"], endpoint["status"]) == ("reply-intent-staging", "running")
    clone.run("make", "clean")


class Delivery:
    "The pipeline's tasks, and the people who sign between its jobs."

    def __init__(self, clone: Clone, folder: Path) -> None:
        self.clone, self.folder = clone, folder
        self.jobs, task = concourse_jobs(), read_yaml(ROOT / CONCOURSE / "task.yml")
        self.words = [task["run"]["path"], *task["run"]["args"]]
        for who in ("ann", "bob"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / who)], check=True)
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(folder / "key.pem")], check=True)
        subprocess.run(["openssl", "ec", "-in", str(folder / "key.pem"), "-pubout", "-out", str(clone.folder / "ci/release.pub")], check=True, capture_output=True)
        signers = [f'{who}@acme.example namespaces="textrelay" {(folder / f"{who}.pub").read_text()}' for who in ("ann", "bob")]
        (clone.folder / "ci/allowed_signers").write_text("".join(signers))
        self.secrets = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "TEXTRELAY_SIGNING_KEY": (folder / "key.pem").read_text()}
        self.secrets["TEXTRELAY_HOME"] = str(folder / "state")
        self.commit("Who may approve, and the key of releases")

    def commit(self, why: str) -> None:
        self.clone.run("git", "add", "-A")
        self.clone.run("git", "-c", "user.name=tests", "-c", "user.email=tests@acme.example", "commit", "-qm", why)

    def job(self, name: str, code: int = 0) -> list[str]:
        "Run the tasks of a job; with a code, its first one must end so."
        commands = self.jobs[name][:1] if code else self.jobs[name]
        assert commands
        return [self.clone.run(*(w.replace("((command))", c) for w in self.words), code=code, **self.secrets) for c in commands]

    def textrelay(self, *words: str) -> Any:
        return json.loads(self.clone.run(".venv/bin/textrelay", *words, "--json", **self.secrets))

    def approve(self, who: str, kind: str, subject: str, *more: str) -> None:
        self.textrelay("approve", kind, subject, "--by", f"{who}@acme.example", "--key", str(self.folder / who), "--reason", "read and tried", *more)

    def served(self, name: str) -> str:
        return next(e["release"] for e in self.textrelay("endpoints") if e["name"] == name)


@pytest.mark.soak
def test_concourse_tasks_in_order_with_the_people_between(clone: Clone, tmp_path: Path) -> None:
    cd = Delivery(clone, tmp_path)
    released = []
    try:
        for number in (1, 2):
            assert "no approval to build" in cd.job("build", code=3)[0]
            cd.approve("ann", "build", "HEAD", "--params", "params/staging.yaml")
            cd.job("build")
            released.append(cd.served("reply-intent-staging"))
            assert "no approval to promote" in cd.job("promote", code=3)[0]
            cd.approve("bob", "promote", released[-1])
            cd.job("promote")
            assert cd.served("reply-intent-production") == released[-1]
            if number == 1:
                quickstart = clone.folder / "params/quickstart.yaml"
                quickstart.write_text(quickstart.read_text().replace("{floor: 0.3}", "{floor: 0.31}"))
                cd.commit("A higher floor")
        assert len(set(released)) == 2
        cd.job("rollback")
        assert cd.served("reply-intent-production") == released[0]
    finally:
        clone.run("make", "clean", **cd.secrets)
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
