"The package as strangers get it: installed bare, it imports for nothing and serves a saved model."

import ast
import json
import os
import re
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import pytest

from conftest import ROOT, free_port, running

HEAVY = ("torch", "transformers", "mlflow", "papermill", "boto3", "sagemaker", "pandas", "sklearn", "nbdev", "fastcore")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    "Python of a new environment with `pip install .` and nothing else."
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    # From a copy: pip builds in place and would leave its egg-info and build folders in the checkout.
    copy = folder / "source"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(copy)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(copy)], check=True)
    return python


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from textrelay.classifier import TransformerClassifier, tiny_model
    from textrelay.filters import Automatic, CurrentReply, Stamp
    from textrelay.model import Model

    folder = tmp_path_factory.mktemp("model")
    clf = TransformerClassifier(tiny_model(folder / "tiny"), epochs=1, threads=1, quiet=True)
    clf.fit(["yes call", "no budget", "stop remove"] * 4, ["positive", "objection", "unsubscribe"] * 4)
    return Model(clf, before=[Automatic(), CurrentReply()], after=[Stamp()], name="demo").save(folder / "model")


def test_importing_costs_nothing():
    code = "import sys; before = set(sys.modules); import textrelay; print(len(set(sys.modules) - before))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) <= 2


def test_a_bare_installation_serves_a_saved_model(bare, model, tmp_path):
    installed = subprocess.run([str(bare), "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True).stdout
    names = {p["name"].lower() for p in json.loads(installed)}
    assert "textrelay" in names and not names & {"torch", "transformers", "mlflow", "papermill", "boto3", "sagemaker", "pandas", "scikit-learn", "nbdev", "fastcore"}
    command, port = [str(bare.parent / "textrelay"), "serve", str(model), "--port"], free_port()
    with running([*command, str(port)], f"http://127.0.0.1:{port}/ping", tmp_path / "log", {"PATH": os.environ["PATH"]}):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps({"text": "yes call"}).encode(), {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=10))
    assert answer["predictions"][0]["status"] == "scored" and answer["model"]["name"] == "demo"


def test_a_command_that_needs_an_extra_says_which(bare, tmp_path):
    (tmp_path / "p.yaml").write_text("train: {}\n")
    done = subprocess.run([str(bare.parent / "textrelay"), "run", str(tmp_path / "p.yaml")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "pip install 'textrelay[train,track]'" in done.stderr and "Traceback" not in done.stderr


def readme_lines(tmp_path: Path) -> list[str]:
    "README's Python as printed, but for the model's name: no hub is at hand in tests, so that a folder stands for it. The last line is printed."
    from textrelay.classifier import tiny_model

    lines = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert lines.count('"distilbert-base-uncased"') == 1 and lines.rstrip().endswith('.answer(["Sounds good, call me on Tuesday."])')
    *before, last = lines.replace('"distilbert-base-uncased"', repr(tiny_model(tmp_path / "tiny"))).rstrip().split("\n")
    return ["texts, labels = ['yes call', 'no stop'] * 4, ['positive', 'unsubscribe'] * 4", *before, f"print({last})"]


def check(printed: str, elsewhere: Path) -> None:
    answer, = ast.literal_eval(printed.strip().splitlines()[-1])
    assert answer["status"] in ("scored", "abstained") and set(answer["scores"]) == {"positive", "unsubscribe"}
    assert (elsewhere / ".textrelay/mlflow.db").is_file(), "the store is where the work was done"


def outside() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "TEXTRELAY"))}


def test_the_lines_of_readme_work_as_printed_outside_the_repository(tmp_path):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "lines.py").write_text("\n".join(readme_lines(tmp_path)))
    done = subprocess.run([sys.executable, "lines.py"], cwd=elsewhere, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(done.stdout, elsewhere)


@pytest.mark.soak
def test_the_lines_of_readme_work_in_a_notebook_of_a_new_environment(bare, tmp_path):
    "A few minutes: torch and all that belongs to it are installed anew, as README says."
    import nbformat

    pip = [str(bare), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, f"{bare.parent.parent / 'source'}[train,track]"], check=True)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    cells = [nbformat.v4.new_code_cell(source) for source in ("\n".join(readme_lines(tmp_path)), "import nbdev")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), elsewhere / "lines.ipynb")
    env = outside() | {"JUPYTER_PREFER_ENV_PATH": "1"}
    done = subprocess.run([str(bare), "-m", "papermill", "--kernel", "python3", "lines.ipynb", "out.ipynb"], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "No module named 'nbdev'" in done.stderr, f"the last cell fails, since this is another environment: {done.stderr}"
    printed = nbformat.read(elsewhere / "out.ipynb", as_version=4).cells
    check("".join(o.text for c in printed if c.cell_type == "code" for o in c.outputs if o.output_type == "stream" and o.name == "stdout"), elsewhere)
