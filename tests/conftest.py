"What several test files need: the real data beside the repository, and a state folder of their own."

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

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
