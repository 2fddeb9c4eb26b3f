"""What is in force: two who promote at once, a promotion that is killed at any step, MLflow gone in the middle; and CD from end to end.

Real processes, endpoints, keys and stores. Where approvals do not hold (forged, revoked, of another digest, a clock ahead) is in nbs/lib/32_approvals.ipynb
and 56_releases.ipynb."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import LABELS, ROOT, seal
from test_server import POSTGRES, Server, database, server  # noqa: F401
from textrelay.core import read_json, write_table
from textrelay.targets import LocalTarget

# Dies by SIGKILL when a function of ours is called or returns, and says what came of it otherwise.
PROMOTE = """
import json, os, pathlib, sys, time
release, environment, event, function, go = sys.argv[1:]
def hook(frame, what, arg):
    if what == event and frame.f_code.co_name == function and "textrelay" in frame.f_code.co_filename: os.kill(os.getpid(), 9)
import textrelay.releases as releases
from textrelay.core import Refused
print("ready", flush=True)
while not pathlib.Path(go).exists(): time.sleep(0.005)
if function: sys.setprofile(hook)
try:
    change, endpoint = releases.promote(release, environment, name="demo", endpoint=environment, patience_s=3)
    print(json.dumps(["done", change.number, endpoint.release]))
except Refused as e: print(json.dumps(["refused", str(e)]))
except Exception as e: print(json.dumps(["failed", f"{type(e).__name__}: {e}"]))
"""
STEPS = [("call", "claim"), ("return", "claim"), ("call", "deploy"), ("return", "deploy"), ("call", "close"), ("return", "close"), ("return", "mirror")]


def registered(bundle: Path) -> str:
    "Make a bundle a version, as the wrap stage does; its release."
    from textrelay.exchange import experiment, store
    from textrelay.registry import register

    client, release = store(), str(read_json(bundle / "release.json")["release"])
    run = client.create_run(experiment(), tags={"textrelay.stage": "wrap", "textrelay.verdict": "PASS"}).info
    client.log_artifacts(run.run_id, str(bundle), "sealed/data/bundle")
    (bundle.parent / "MLmodel").write_text("flavors:\n  textrelay.flavor:\n    data: data/bundle\n")
    client.log_artifact(run.run_id, str(bundle.parent / "MLmodel"), "sealed")
    if not any(m.name == "demo" for m in client.search_registered_models()):
        client.create_registered_model("demo")
    version = client.create_model_version("demo", f"{run.artifact_uri}/sealed", run.run_id)
    register("demo", str(version.version), release)
    return release


@contextlib.contextmanager
def three(folder: Path, bundle: Path, **env: str) -> Iterator[list[str]]:
    "Three registered releases; each test has an environment of its own in their store, and an endpoint of the same name."
    before = dict(os.environ)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        os.environ.pop(name, None)
    os.environ.update(TEXTRELAY_HOME=str(folder / "state"), **env)
    made = []
    for n in "123":
        shutil.copytree(bundle, folder / n)
        (folder / n / "version.txt").write_text(n)
        made.append(registered(seal(folder / n, version=n)))
    try:
        yield made
    finally:
        for endpoint in LocalTarget().endpoints():
            LocalTarget().delete(endpoint.name)
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Iterator[list[str]]:
    with three(tmp_path_factory.mktemp("releases"), tiny_bundle) as made:
        yield made


def served(environment: str) -> str:
    return next(e.release for e in LocalTarget().endpoints() if e.name == environment)


def start(tmp_path: Path, environment: str, release: str, event: str = "", function: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROMOTE, release, environment, event, function, str(tmp_path / "go")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def told(process: subprocess.Popen[str]) -> list[Any]:
    out, err = process.communicate(timeout=120)
    return list(json.loads(out)) if out else ["killed", process.returncode, err]


def one_of_two_wins(tmp_path: Path, environment: str, first: str, second: str) -> None:
    from textrelay.registry import champion, history

    both = [start(tmp_path, environment, r) for r in (first, second)]
    (tmp_path / "go").touch()
    outcomes = [told(p) for p in both]
    assert sorted(o[0] for o in outcomes) == ["done", "refused"], outcomes
    won, = (o for o in outcomes if o[0] == "done")
    lost, = (o for o in outcomes if o[0] == "refused")
    assert won[2][:19] in lost[1] and f"entry {won[1]}" in lost[1] and f"demo@{environment}" in lost[1], lost
    assert [(c.release, c.state) for c in history("demo", environment)] == [(won[2], "in force")]
    reigning = champion("demo", environment)
    assert reigning and reigning.release == served(environment) == won[2]


def test_of_two_who_promote_at_once_exactly_one_wins(releases: list[str], tmp_path: Path) -> None:
    one_of_two_wins(tmp_path, "at-once", *releases[:2])


def test_who_comes_while_another_promotion_is_under_way_does_not_promote_over_it(releases: list[str], tmp_path: Path) -> None:
    from textrelay.registry import champion, claim, close, find_release

    one, two, _ = releases
    first = claim(find_release(one, "demo"), "late", seen=[], endpoint="late")
    process = start(tmp_path, "late", two)
    (tmp_path / "go").touch()
    assert process.stderr and "is open; watching" in process.stderr.readline()
    close(first, "in force")  # without `at_work`: a beat that is seen before the end is the other refusal, "is under way"
    outcome = told(process)
    assert outcome[0] == "refused" and one[:19] in outcome[1] and "was first" in outcome[1], outcome
    reigning = champion("demo", "late")
    assert reigning and reigning.release == one


def killed_then_settled(tmp_path: Path, environment: str, before: str, new: str, event: str, function: str) -> str:
    "What is in force after a promotion was killed, and the next command came; always what is served."
    from textrelay.registry import champion, history, mirror
    from textrelay.releases import status

    process = start(tmp_path, environment, new, event, function)
    (tmp_path / "go").touch()
    outcome = told(process)
    (tmp_path / "go").unlink()
    assert outcome[:2] == ["killed", -9], outcome
    reigning = champion("demo", environment)
    assert reigning and reigning.release in (before, new), "never a half state: even before anybody looked"
    row, = status(f"demo@{environment}", patience_s=0.3)
    assert row["problems"] == [] and row["release"] == served(environment), (event, function, row)
    assert history("demo", environment)[-1].state in ("in force", "undone") and mirror("demo") == []
    return str(row["release"])


def test_a_promotion_that_was_killed_after_its_release_had_taken_over_is_finished(releases: list[str], tmp_path: Path) -> None:
    from textrelay.releases import promote

    one, two, _ = releases
    promote(one, "killed", name="demo", endpoint="killed")
    assert killed_then_settled(tmp_path, "killed", one, two, "call", "close") == two


@pytest.mark.soak
def test_a_promotion_may_be_killed_at_each_step_and_is_done_again(releases: list[str], tmp_path: Path) -> None:
    from textrelay.registry import history, in_force
    from textrelay.releases import promote

    before, new = releases[:2]
    promote(before, "each", name="demo", endpoint="each")
    seen = {}
    for event, function in STEPS:
        seen[event, function] = killed_then_settled(tmp_path, "each", before, new, event, function) == new
        promote(new, "each", name="demo", endpoint="each", patience_s=0.3)
        now = in_force(history("demo", "each"))
        assert now and now.release == new == served("each")
        before, new = new, before
    print("finished (else undone), by where it was killed:", seen)
    assert list(seen.values()) == [False, False, False, True, True, True, True]


def test_what_somebody_deployed_by_hand_is_seen_and_put_right(releases: list[str]) -> None:
    from textrelay.flavor import model_folder
    from textrelay.registry import find_release
    from textrelay.releases import promote, rollback, status

    one, two, _ = releases
    promote(one, "by-hand", name="demo", endpoint="by-hand")
    LocalTarget().deploy(model_folder(find_release(two).uri), "by-hand")
    row, = status("by-hand")
    assert row["release"] == one and "no entry accounts for" in row["problems"][0]
    change, endpoint = rollback("demo", "by-hand")
    assert change.release == endpoint.release == one and status("by-hand")[0]["problems"] == []


# A team's server --------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.skipif(not POSTGRES, reason="no PostgreSQL in /usr/lib/postgresql (Debian: postgresql); the MLflow server of this test needs it")
def test_on_a_server_one_of_two_wins_and_a_dead_server_leaves_no_half_state(server: Server, tiny_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    from textrelay.releases import status

    with three(tmp_path, tiny_bundle, MLFLOW_TRACKING_URI=server.url, MLFLOW_HTTP_REQUEST_MAX_RETRIES="2") as made:
        one_of_two_wins(tmp_path, "shared", *made[:2])
        (tmp_path / "go").unlink()
        process = start(tmp_path, "shared", made[2])
        (tmp_path / "go").touch()
        deadline = time.monotonic() + 60
        while served("shared") != made[2]:  # claimed, and the target has just changed over
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        server.kill()
        outcome = told(process)
        server.start()
        row, = status("demo@shared", patience_s=1)
        print(f"the server died while the target changed over; the promotion {outcome[0]}: {str(outcome[1])[:150]}; status then: {row['repaired']}")
        assert row["problems"] == [] and row["release"] == served("shared") == made[2] and outcome[0] in ("failed", "done")


# CD from end to end -----------------------------------------------------------------------------------------------------

PRODUCTION = """
train: {dataset: replies.jsonl, model: tiny, max_length: 24, epochs: 6, learning_rate: 2e-3, batch_size: 8, threads: 1, allowed_signers: ci/allowed_signers}
test: {gates: [{metric: accuracy, at_least: 0.05}]}
wrap:
  name: replies
  engine: onnxruntime float32
  after: [Stamp]
  champion: production
  gates: [{metric: accuracy, at_least: 0.05}, {metric: accuracy, not_worse_than: champion, margin: 0.05, waiver: the first release of all}]
deploy: {endpoint: replies-production, alias: production, requests: 3, public_key: ci/release.pub, allowed_signers: ci/allowed_signers}
"""
STAGING = "extends: production.yaml\ndeploy: {endpoint: replies-staging, alias: staging, allowed_signers: null}\n"
WORDS = dict(zip(LABELS[:3], ("yes call meet", "no budget we", "stop remove this"), strict=True))


class Checkout:
    "A repository, and people who type commands in it."

    def __init__(self, folder: Path) -> None:
        self.folder, self.place = folder, folder.parent
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
        self.env |= {"TEXTRELAY_HOME": str(self.place / "state"), "PYTHONPATH": str(folder / "src_generated"), "TEXTRELAY_SIGNING_KEY": str(self.place / "key.pem")}

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "init.defaultBranch=main")
        return subprocess.run(["git", *identity, *words], cwd=self.folder, check=True, capture_output=True, text=True).stdout.strip()

    def textrelay(self, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "textrelay.cli", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def approve(self, who: str, *words: str) -> str:
        return self.textrelay("approve", *words, "--by", f"{who}@acme.example", "--key", str(self.place / who), "--reason", "looked at it").split()[0]

    def build(self, change: Callable[[str], str], message: str, code: int = 0) -> Any:
        "Commit other parameters, have the build approved, run the chain up to staging."
        path = self.folder / "params/production.yaml"
        path.write_text(change(path.read_text()))
        self.git("commit", "-q", "-a", "-m", message)
        self.approve("ann", "build", "HEAD", "--params", "params/staging.yaml")
        said = self.textrelay("run", "params/staging.yaml", "--json", code=code)
        return json.loads(said)["results"]["wrap"]["release"] if code == 0 else said


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    from textrelay.classifier import tiny_model

    folder = tmp_path / "checkout"
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if name and not name.startswith(("data/", "tests/", "benchmarks/", "params/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    tiny_model(folder / "tiny")
    rng = random.Random(0)
    noise = ["".join(rng.choice("bcdfgklmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(900)]
    rows = [{"text": " ".join([*rng.sample(words.split(), 3), *rng.sample(noise, 9)]), "label": label} for label, words in WORDS.items() for _ in range(200)]
    write_table(folder / "replies.jsonl", rows)
    (folder / "params").mkdir()
    (folder / "params/production.yaml").write_text(PRODUCTION)
    (folder / "params/staging.yaml").write_text(STAGING)
    for who in ("ann", "bob", "eve"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", who, "-f", str(tmp_path / who)], check=True)
    (folder / "ci").mkdir(exist_ok=True)
    (folder / "ci/allowed_signers").write_text("".join(f"{who}@acme.example {(tmp_path / f'{who}.pub').read_text()}" for who in ("ann", "bob")))
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", tmp_path / "key.pem"], check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", tmp_path / "key.pem", "-pubout", "-out", folder / "ci/release.pub"], check=True, capture_output=True)
    place = Checkout(folder)
    place.git("init", "-q")
    place.git("add", "--all", "--force")
    place.git("commit", "-q", "-m", "first")
    yield place
    for endpoint in LocalTarget(tmp_path / "state").endpoints():
        LocalTarget(tmp_path / "state").delete(endpoint.name)


@pytest.mark.soak
def test_from_an_approved_build_to_production_and_back(checkout: Checkout) -> None:
    def in_production() -> tuple[str, str]:
        row, = json.loads(checkout.textrelay("status", "replies@production", "--json"))
        live, = (e for e in LocalTarget(checkout.place / "state").endpoints() if e.name == "replies-production")
        return row["release"], live.release

    assert "no approval to build" in checkout.textrelay("run", "params/staging.yaml", code=3)
    first = checkout.build(lambda text: text + "# the first\n", "first")
    production = ("promote", first, "params/production.yaml")
    assert "no approval to promote" in checkout.textrelay(*production, code=3)
    assert "not by a key" in checkout.textrelay("approve", "promote", first, "--by", "bob@acme.example", "--key", str(checkout.place / "eve"), "--reason", "mine", code=1)
    checkout.approve("ann", "promote", first)
    assert "somebody else" in checkout.textrelay(*production, code=3)
    withdrawn = checkout.approve("bob", "promote", first)
    checkout.approve("ann", "revoke", withdrawn)
    assert "somebody else" in checkout.textrelay(*production, "--dry-run", code=3), "a revoked one does not count"
    checkout.approve("bob", "promote", first[:19])
    assert "now: nothing" in checkout.textrelay(*production, "--dry-run")
    checkout.textrelay(*production)
    assert in_production() == (first, first)

    worse = checkout.build(lambda text: text.replace("epochs: 6, learning_rate: 2e-3", "epochs: 1, learning_rate: 1e-7"), "worse", 3)
    assert "stage wrap: FAIL" in worse and "accuracy" in worse and in_production() == (first, first)
    better = checkout.build(lambda text: text.replace("epochs: 1, learning_rate: 1e-7", "epochs: 8, learning_rate: 2e-3"), "better")
    assert better != first and "no approval to promote" in checkout.textrelay("promote", "replies@staging", "params/production.yaml", code=3)
    checkout.approve("bob", "promote", better)
    checkout.textrelay("promote", "replies@staging", "params/production.yaml")
    assert in_production() == (better, better)
    assert "is production" in checkout.textrelay("deploy", "models:/replies@previous", "replies-production", code=3)
    assert "Delete it?" in checkout.textrelay("endpoints", "replies-production", "--delete", code=1) and in_production() == (better, better), "nobody said yes"
    assert first in checkout.textrelay("rollback", "replies-production", "--dry-run") and in_production() == (better, better)
    assert first in checkout.textrelay("rollback", "replies-production")
    assert in_production() == (first, first)

    log = checkout.textrelay("log")
    print(log)
    told = [line[21:].split("  ")[0] for line in log.splitlines()]
    story = ["refused", "approved", "test PASS", "wrap PASS", "promoted", "refused", "approved", "refused", "approved", "revoked", "approved", "promoted",
             "approved", "test PASS", "wrap FAIL", "approved", "test PASS", "wrap PASS", "promoted", "refused", "approved", "promoted", "rolled back"]
    assert told == story and "waived: the first release of all" in log
    texts = checkout.textrelay("status", "replies-production")
    assert "let by" in texts and "bob@acme.example" in texts and "previous   none" in texts and "rollback by" in texts

