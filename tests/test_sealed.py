"""The sealed model: private packages out of Git repositories that ask for a password, an index that must not know their names, the way back from an answer.

One server plays both: Git repositories behind HTTP basic authentication, and a package index which notes what it is asked for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from textrelay.core import read_json, write_table
from textrelay.secrets import find_secrets
from textrelay.targets import Endpoint, LocalTarget, request
from textrelay.wheels import canonical

WORDS = {"positive": "yes meet call next week", "objection": "no price budget we use", "unsubscribe": "stop remove who is this"}
PRIVATE = {"acme-filters", "acme-core", "emoji"}  # the last is the name of a public package
TOKEN = "tr" + "-planted-" + "0123456789abcdef"
AWAY = b"Subject: Automatic reply: hello\nAuto-Submitted: auto-replied\n\nI am out of office.\n"
PARAMS = """
train: {dataset: replies.jsonl, model: tiny, max_length: 16, epochs: 2, threads: 1}
test: {gates: [{metric: accuracy, at_least: 0.01}]}
wrap:
  engine: onnxruntime float32
  before: [Automatic, CurrentReply, acme_filters.Shouting]
  after: [Stamp]
  private: ["git+http://ci:${ACME_TOKEN}@HOST/git/acme-filters.git@v1", "git+http://ci:${ACME_TOKEN}@HOST/git/emoji.git@v1"]
  gates: [{metric: accuracy, at_least: 0.01}]
deploy: {endpoint: sealed, requests: 3, options: {capture: 1.0}}
"""
SHOUTING = """
from acme_core import LIMIT
from emoji import strip

from textrelay.filters import Filter


class Shouting(Filter):
    "Abstain on capital letters."

    def apply(self, record):
        text = strip(record["text"])
        return self.hold(record, "abstained", "acme_shouting") if len(text) > LIMIT and text.isupper() else record
"""


def git(folder: Path, *args: str) -> str:
    command = ["git", "-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "init.defaultBranch=main", "-C", str(folder), *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def private_package(at: Path, name: str, code: str, needs: list[str]) -> str:
    "A bare repository with one tag, as a web server can serve it; the commit."
    work = at / "work" / name
    (work / name.replace("-", "_")).mkdir(parents=True)
    (work / name.replace("-", "_") / "__init__.py").write_text(code)
    (work / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
                                         f'[project]\nname = "{name}"\nversion = "1.0"\ndependencies = {json.dumps(needs)}\n')
    git(work, "init", "-q")
    git(work, "add", ".")
    git(work, "commit", "-q", "-m", "first")
    git(work, "tag", "v1")
    git(at, "clone", "-q", "--bare", str(work), str(at / "git" / f"{name}.git"))
    git(at / "git" / f"{name}.git", "update-server-info")
    return git(work, "rev-parse", "HEAD")


class Server(ThreadingHTTPServer):
    "Git repositories that ask who is there, and an index that notes whom it is asked for."

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.let_in = folder, set[str](), 0
        self.host, self.commit = f"127.0.0.1:{self.server_port}", ""  # of acme-filters


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        kind, _, rest = path.partition("/")
        if kind == "simple":
            self.server.asked.add(rest)
            files = [f for f in sorted((self.server.folder / "files").iterdir()) if canonical(re.split(r"-\d", f.name)[0]) == rest]
            links = "".join(f'<a href="/files/{f.name}#sha256={hashlib.sha256(f.read_bytes()).hexdigest()}">{f.name}</a>' for f in files)
            return self.reply(200 if files else 404, links.encode(), "text/html")
        if kind == "git" and self.headers.get("Authorization") != "Basic " + base64.b64encode(f"ci:{TOKEN}".encode()).decode():
            return self.reply(401, b"", "text/plain")
        self.server.let_in += kind == "git"
        file = self.server.folder / path
        return self.reply(200, file.read_bytes(), "application/octet-stream") if file.is_file() else self.reply(404, b"", "text/plain")

    def reply(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        if code == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="acme"')
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from textrelay.wheels import public_closure

    folder = tmp_path_factory.mktemp("served")
    (folder / "files").mkdir()
    (folder / "git").mkdir()
    server = Server(folder)
    pins = [f"{n}=={v}" for n, v in public_closure("onnxruntime", []).items() if n != "textrelay"]
    options = ["-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--prefer-binary", "-d", str(folder / "files")]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *pins], check=True, capture_output=True, timeout=300)
    private_package(folder, "acme-core", "LIMIT = 8\n", [])
    private_package(folder, "emoji", "def strip(text):\n    return text.strip(':)')\n", [])
    needs = [f"acme-core @ git+http://{server.host}/git/acme-core.git@v1", "emoji>=1", "numpy"]
    server.commit = private_package(folder, "acme-filters", SHOUTING, needs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Path]:
    "A clean repository with this project's files and a small model, deployed from the command line."
    from textrelay.classifier import tiny_model

    place = tmp_path_factory.mktemp("sealed")
    folder = place / "checkout"
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if name and not name.startswith(("data/", "tests/", "benchmarks/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    tiny_model(folder / "tiny")
    rows = [{"text": " ".join(words[(n + k) % len(words)] for k in range(n % 7 + 2)) + f" {n}", "label": label}
            for label, words in ((k, v.split()) for k, v in WORDS.items()) for n in range(60)]
    write_table(folder / "replies.jsonl", rows)
    (folder / "params/sealed.yaml").write_text(PARAMS.replace("HOST", server.host))
    git(folder, "init", "-q")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "-q", "-m", "first")
    git(folder, "tag", "v1")
    home = place / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine 127.0.0.1 login ci password {TOKEN}\n")  # for the package that another one names
    before = dict(os.environ)
    os.environ.update(TEXTRELAY_HOME=str(place / "state"), PYTHONPATH=str(folder / "src_generated"), HOME=str(home), ACME_TOKEN=TOKEN,
                      PIP_INDEX_URL=f"http://{server.host}/simple", PIP_CONFIG_FILE=os.devnull, PIP_CACHE_DIR=str(place / "pip"))
    for name in ("MLFLOW_TRACKING_URI", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        os.environ.pop(name, None)
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", place / "key.pem"], check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", place / "key.pem", "-pubout", "-out", place / "key.pub"], check=True, capture_output=True)
    os.environ["TEXTRELAY_SIGNING_KEY"] = str(place / "key.pem")
    try:
        (place / "run.log").write_text(textrelay(folder, "run", "params/sealed.yaml"))
        yield folder
    finally:
        for served in LocalTarget().endpoints():
            LocalTarget().delete(served.name)
        os.environ.clear()
        os.environ.update(before)


def textrelay(folder: Path, *args: str, said: str | None = None, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "textrelay.cli", *args], cwd=folder, input=said, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout + (done.stderr if code or args[0] == "run" else "")


def endpoint() -> Endpoint:
    return next(e for e in LocalTarget().endpoints() if e.name == "sealed")


def traced(folder: Path, *args: str, said: str | None = None) -> list[dict[str, Any]]:
    return list(json.loads(textrelay(folder, "trace", *args, "--json", said=said)))


def test_private_packages_are_sealed_and_no_index_is_asked_for_them(checkout: Path, server: Server) -> None:
    from textrelay.flavor import model_folder

    bundle = LocalTarget().bundle("sealed")
    packages = {p["name"]: p for p in read_json(bundle / "provenance.json")["packages"]}
    assert set(packages) == {"textrelay", "quotequail"} | PRIVATE and packages["textrelay"]["commit"] == git(checkout, "rev-parse", "HEAD")
    assert (packages["acme-filters"]["commit"], packages["acme-filters"]["source"]) == (server.commit, f"git+http://{server.host}/git/acme-filters.git@v1")
    assert server.let_in and "numpy" in server.asked, "the repositories and the index were used"
    assert not server.asked & (PRIVATE | {"textrelay"}), server.asked
    lines = (bundle / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert not {line.split("==")[0] for line in lines} & (PRIVATE | {"torch", "mlflow"})
    listed = (model_folder("models:/reply-intent/1").parents[1] / "requirements.txt").read_text().splitlines()
    assert {f"data/bundle/wheels/{p['wheel']}" for p in packages.values()} < set(listed) and not [x for x in listed if x.startswith(("textrelay", "acme", "emoji"))]
    answer, = request(endpoint().url, ["STOP WRITING TO ME"], fresh=True)
    assert (answer["status"], answer["reason"]) == ("abstained", "acme_shouting")


def test_no_credential_is_in_bundle_runs_logs_or_state(checkout: Path) -> None:
    state = Path(os.environ["TEXTRELAY_HOME"])
    known = {TOKEN: "the token", base64.b64encode(f"ci:{TOKEN}".encode()).decode(): "the header"}
    assert (state / "mlflow.db").is_file() and "${ACME_TOKEN}" in "".join(p.read_text() for p in state.rglob("params.json"))
    assert [f for f in find_secrets(state, known) + find_secrets(checkout.parent / "run.log", known) if "the value of" in f] == []
    (state / "planted").write_bytes(b"\0\1" + TOKEN.encode())
    assert find_secrets(state / "planted", known)
    (state / "planted").unlink()
    (checkout / "params/leak.yaml").write_text((checkout / "params/sealed.yaml").read_text().replace("${ACME_TOKEN}", TOKEN))
    said = textrelay(checkout, "run", "params/leak.yaml", code=1)
    (checkout / "params/leak.yaml").unlink()
    assert "holds a credential" in said and TOKEN not in said and not find_secrets(state / "mlflow.db", known)


def test_verified_by_a_stranger_in_an_environment_of_nothing_but_the_bundle(checkout: Path, server: Server, tmp_path: Path) -> None:
    bundle, public = LocalTarget().bundle("sealed"), str(checkout.parent / "key.pub")
    found = json.loads(textrelay(tmp_path, "verify", str(bundle), "--key", public, "--install", str(server.folder / "files"), "--json"))
    assert found["golden"] == 12 and found["environment"] == "made from the wheelhouse" and "key.pub" in found["signature"]
    assert found["release"] == endpoint().release
    copy = shutil.copytree(bundle, tmp_path / "copy")
    wheel = next((copy / "wheels").glob("emoji-*.whl"))
    wheel.write_bytes(wheel.read_bytes().replace(b"text.strip", b"text.strap"))
    assert f"changed: wheels/{wheel.name}" in textrelay(tmp_path, "verify", str(copy), code=1)


@pytest.mark.soak
def test_production_takes_only_what_is_signed_and_approved_by_two(checkout: Path) -> None:
    run = [line.split()[1].rstrip(":") for line in (checkout.parent / "run.log").read_text().splitlines() if line.startswith("chain ")][0]
    settings: tuple[str, ...] = ("--set", "deploy.alias=production", "--set", "deploy.endpoint=sealed-production")
    said = textrelay(checkout, "run", "params/sealed.yaml", "--stage", "deploy", "--from", run, *settings, code=3)
    assert "allowed_signers" in said
    place, release, head = checkout.parent, endpoint().release, git(checkout, "rev-parse", "HEAD")
    for who in ("ann", "bob"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / who)], check=True)
    (place / "signers").write_text("".join(f"{who}@acme.example {(place / f'{who}.pub').read_text()}" for who in ("ann", "bob")))

    def approve(who: str, *words: str) -> None:
        who_and_why = ("--by", f"{who}@acme.example", "--key", str(place / who), "--allowed-signers", str(place / "signers"), "--reason", "read it")
        textrelay(checkout, "approve", *words, *who_and_why)

    settings = (*settings, "--set", f"deploy.allowed_signers={place}/signers")
    assert "no approval to promote" in textrelay(checkout, "run", "params/sealed.yaml", "--stage", "deploy", "--from", run, *settings, code=3)
    approve("ann", "promote", release)
    assert "no approval to build" in textrelay(checkout, "run", "params/sealed.yaml", "--stage", "deploy", "--from", run, *settings, code=3)
    approve("ann", "build", head, "--params", "params/sealed.yaml")
    assert "somebody else" in textrelay(checkout, "run", "params/sealed.yaml", "--stage", "deploy", "--from", run, *settings, code=3)
    approve("bob", "promote", release)
    assert "public_key" in textrelay(checkout, "run", "params/sealed.yaml", "--stage", "deploy", "--from", run, *settings, code=1)
    settings = (*settings, "--set", f"deploy.public_key={place}/key.pub")
    textrelay(checkout, "run", "params/sealed.yaml", "--stage", "deploy", "--from", run, *settings)
    told = textrelay(checkout, "log", "--allowed-signers", str(place / "signers")).splitlines()
    approved = [line for line in told if "read it [" in line]
    assert len(approved) == 3 and all(line.endswith("counts]") for line in approved)
    assert [line.split()[2] for line in told if "reply-intent@" in line] == ["promoted", "promoted"] and sum(" refused " in line for line in told) == 4


@pytest.mark.soak
def test_two_clean_clones_make_the_same_bundle(checkout: Path, tmp_path: Path) -> None:
    from textrelay.flavor import model_folder

    run = [line.split()[1].rstrip(":") for line in (checkout.parent / "run.log").read_text().splitlines() if line.startswith("chain ")][0]
    git(tmp_path, "clone", "-q", str(checkout), str(tmp_path / "elsewhere"))
    os.environ["PYTHONPATH"] = str(tmp_path / "elsewhere/src_generated")
    try:
        said = textrelay(tmp_path / "elsewhere", "run", "params/sealed.yaml", "--stage", "wrap", "--from", run, "--force", "--json")
    finally:
        os.environ["PYTHONPATH"] = str(checkout / "src_generated")
    one, two = LocalTarget().bundle("sealed"), model_folder(json.loads(said[said.index("{") : said.rindex("}") + 1])["results"]["wrap"]["bundle_uri"])
    assert read_json(one / "provenance.json") == read_json(two / "provenance.json")
    assert read_json(one / "manifest.json") == read_json(two / "manifest.json") and read_json(two / "release.json")["release"] == endpoint().release


def cell_of(folder: Path, notebook: str, cell: str) -> str:
    return next("".join(c["source"]) for c in json.loads((folder / notebook).read_text())["cells"] if c["id"] == cell)


def registered(release: str) -> tuple[list[str], list[str]]:
    "Versions and aliases of a release, as MLflow has them: the soak tests before may have made more of them."
    from textrelay.exchange import store

    client = store()
    versions = [str(v.version) for v in client.search_model_versions("name='reply-intent'") if v.tags.get("textrelay.release") == release]
    aliases = client.get_registered_model("reply-intent").aliases
    assert "1" in versions and str(aliases["local"]) in versions
    return sorted(versions, key=int), sorted(a for a, v in aliases.items() if str(v) in versions)


def test_an_answer_leads_to_the_cell_as_it_was_even_after_the_notebook_changed(checkout: Path) -> None:
    running = endpoint()
    answers = request(running.url, [{"id": "a", "text": "yes meet\n\nOn Monday, Bob wrote:\n> hello"}, AWAY])
    held = answers[1]
    by_id, = traced(checkout, held["prediction_id"])
    head = git(checkout, "rev-parse", "HEAD")
    assert by_id["release"] == running.release and by_id["commit"] == head and by_id["tag"] == "v1" and by_id["dirty"] is False
    assert (by_id["versions"], by_id["aliases"]) == registered(running.release) and by_id["dataset"]["digest"].startswith("sha256:") and by_id["filters"] == []
    assert by_id["train"]["notebook"] == "nbs/stages/1_train.ipynb" and ".fit(" in by_id["train"]["source_code"]
    assert by_id["train"]["source_code"] == cell_of(checkout, "nbs/stages/1_train.ipynb", by_id["train"]["cell"])

    response = json.dumps({"predictions": answers})
    first, second = traced(checkout, "-", said=response)
    assert first["filters"] == [], "a filter that only changed the text leaves no reason in the answer"
    found, = second["filters"]
    assert (found["filter"], found["code"], found["notebook"], found["commit"], found["code_from"]) == (
        "textrelay.filters.Automatic", "automatic:out_of_office", "nbs/lib/10_filters.ipynb", head, "git")
    was = cell_of(checkout, found["notebook"], found["cell"])
    assert found["source_code"] == was and "class Automatic(Filter)" in was

    notebook = checkout / "nbs/lib/10_filters.ipynb"
    notebook.write_text(notebook.read_text().replace("class Automatic(Filter)", "class Robotic(Filter)"))
    git(checkout, "commit", "-q", "-a", "-m", "another name")
    again, = traced(checkout, "-", said=json.dumps(held))
    assert again["filters"][0]["source_code"] == was != cell_of(checkout, found["notebook"], found["cell"])


def test_a_private_filter_leads_to_its_repository(checkout: Path, server: Server) -> None:
    answer, = request(endpoint().url, ["REMOVE ME FROM THIS LIST"], fresh=True)
    found, = traced(checkout, "-", said=json.dumps(answer))
    acted, = found["filters"]
    assert (acted["filter"], acted["package"], acted["commit"], acted["module"]) == ("acme_filters.Shouting", "acme-filters", server.commit, "acme_filters/__init__.py")
    assert acted["code_from"] == "wheel" and "Abstain on capital letters" in acted["source_code"]
    assert acted["line"] == SHOUTING.splitlines().index("class Shouting(Filter):") + 1


def test_a_recorded_line_also_shows_filters_that_only_changed_the_message(checkout: Path) -> None:
    running = endpoint()
    request(running.url, [{"id": "b", "text": "no price\n\nOn Monday, Bob wrote:\n> hello"}], fresh=True)
    LocalTarget().start("sealed")  # what was recorded is on disk when a front has ended
    lines = [line for p in LocalTarget().captured("sealed").rglob("*.jsonl") for line in p.read_text().splitlines() if "no price" in line]
    found, = traced(checkout, "-", said=lines[-1] + "\n")
    assert [(f["filter"], f["code"], f["known_by"]) for f in found["filters"]] == [("textrelay.filters.CurrentReply", "text:reply", "replay")]
    assert "class CurrentReply(Filter)" in found["filters"][0]["source_code"]


def test_what_cannot_be_traced_says_why(checkout: Path) -> None:
    unknown = "0" * 12 + "-01900000-0000-7000-8000-000000000000"
    for what, says in (("nonsense", "not a prediction id"), (unknown, "no release begins with 000000000000")):
        done = subprocess.run([sys.executable, "-m", "textrelay.cli", "trace", what], cwd=checkout, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
