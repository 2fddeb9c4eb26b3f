"What several test files need: the real data beside the repository, a state folder of their own, a small bundle, AWS as it is rehearsed."

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from textrelay.core import digest_json, manifest, write_json, write_table
from textrelay.worker import write_release

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("TEXTRELAY_SHARED", ROOT.parent / "shared"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    "A server and its children, ended afterwards; yields once `url` answers with 200."
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(OSError):  # an HTTP error is one, too
                urllib.request.urlopen(url, timeout=5)
                break
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def real_data(name: str) -> Path:
    path = SHARED / "data" / name / "train.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there: it lies outside the repository (README, 'Real data')")
    return path


@pytest.fixture(scope="session")
def enron() -> Path:
    "Real sentences from business e-mail with two intents; see README for where others get them."
    return real_data("enron_intent")


@pytest.fixture(scope="session")
def banking77() -> Path:
    "Real questions to a bank with 77 intents."
    return real_data("banking77")


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    "A state folder that nobody else uses, without a tracking server."
    monkeypatch.setenv("TEXTRELAY_HOME", str(tmp_path / "state"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "state"


TEXTS = ["yes we meet next week", "no budget", "stop remove", "yes call", "we use this no thanks", "remove this stop"]
LABELS = ["positive", "objection", "unsubscribe"]
AWAY = "Subject: Automatic reply: hello\nAuto-Submitted: auto-replied\n\nI am out of office.\n"


def seal(folder: Path, **facts: Any) -> Path:
    "Write manifest and release of whatever lies in a folder."
    for name in ("manifest.json", "release.json"):
        (folder / name).unlink(missing_ok=True)
    content = manifest(folder)
    write_json(folder / "manifest.json", content)
    write_release(folder, {"release": digest_json(content), "name": "reply-intent", **facts})
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from textrelay.classifier import TransformerClassifier, tiny_model
    from textrelay.filters import Automatic, CurrentReply, Stamp
    from textrelay.model import Model

    folder = tmp_path_factory.mktemp("serving")
    tiny = tiny_model(f"{folder}/tiny")
    clf = TransformerClassifier(tiny, epochs=30, learning_rate=2e-3, batch_size=8, precision="float32", threads=1, quiet=True)
    clf.fit(TEXTS * 8, LABELS * 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on tracing
        Model(clf, before=[Automatic(), CurrentReply()], after=[Stamp()], name="reply-intent").save(folder / "bundle" / "model")
    items: list[Any] = [*TEXTS, {"raw": AWAY}]
    answers = Model.load(folder / "bundle" / "model").answer(items)
    expected = [{k: a[k] for k in ("label", "status", "reason", "scores")} for a in answers]
    write_table(folder / "bundle" / "golden.jsonl", [{"item": i, "expected": e} for i, e in zip(items, expected, strict=True)])
    return seal(folder / "bundle", version="7", run_id="0123abcd", commit="4567cdef")


@pytest.fixture
def another(tiny_bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    "Makes another release with the same model."

    def make(version: str) -> Path:
        folder = tmp_path / f"bundle-{version}"
        shutil.copytree(tiny_bundle, folder)
        (folder / "version.txt").write_text(version)
        return seal(folder, version=version)

    return make


@pytest.fixture(scope="module")
def rehearsal() -> Iterator[Any]:
    "AWS as it is rehearsed, 600 times as fast; the process's environment names it instead of AWS."
    from textrelay.rehearsal import Server

    with Server(speed=600) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
