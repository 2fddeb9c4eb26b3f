"What several test files need: the real data beside the repository, and a state folder of their own."

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("TEXTRELAY_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def enron() -> Path:
    "Real sentences from business e-mail with two intents; see README for where others get them."
    path = SHARED / "data/enron_intent/train.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the Enron intent data lies outside the repository (README, 'Real data')")
    return path


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    "A state folder that nobody else uses, without a tracking server."
    monkeypatch.setenv("TEXTRELAY_HOME", str(tmp_path / "state"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "state"
