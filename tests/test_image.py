"""The image of a sealed bundle: built with buildah from a Debian base, started without a network, as nobody, on a read-only root.

Docker, podman and buildah read the same Dockerfile; buildah needs no daemon, and its chroot isolation works where containers may not be nested."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from textrelay.core import read_table

pytestmark = pytest.mark.soak
SUITE, TOKEN = "bookworm", "tr" + "-planted-" + "0123456789abcdef"
LIMIT_MB = {"onnxruntime": 260, "openvino": 420}


def run(*command: str | Path, timeout: float = 900, **more: Any) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, **more)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class Buildah:
    "buildah with a store of its own."

    def __init__(self, folder: Path) -> None:
        self.words = ["buildah", "--storage-driver=vfs", f"--root={folder}/store", f"--runroot={folder}/run"]

    def __call__(self, *args: str | Path) -> str:
        return run(*self.words, *args).strip()


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if missing := [tool for tool in ("buildah", "debootstrap", "unshare") if not shutil.which(tool)]:
        pytest.skip(f"{missing} not installed (Debian packages of the same names)")
    if os.geteuid() != 0:
        pytest.skip("building without a container engine needs root")
    folder = tmp_path_factory.mktemp("buildah")
    builder = Buildah(folder)
    tree = Path(tempfile.gettempdir()) / f"textrelay-{SUITE}"
    if not (tree / "done").is_file():
        shutil.rmtree(tree, ignore_errors=True)
        run("debootstrap", "--variant=minbase", "--include=python3,python3-venv", SUITE, tree / "root")
        (tree / "done").touch()
    container = builder("from", "scratch")
    builder("add", container, tree / "root", "/")
    builder("commit", "--rm", container, "base")
    yield builder
    builder("rm", "--all")
    shutil.rmtree(folder, ignore_errors=True)


def make_bundle(at: Path, engine_name: str) -> Path:
    "A small model with filters, sealed as the wrap stage does it."
    from textrelay import wheels
    from textrelay.classifier import TransformerClassifier, export_onnx, tiny_model
    from textrelay.engines import build_engine
    from textrelay.filters import Automatic, CurrentReply, Stamp
    from textrelay.model import Model
    from textrelay.sealing import seal

    texts = ["yes we meet next week", "no budget", "stop remove"] * 8
    clf = TransformerClassifier(tiny_model(at / "tiny"), epochs=2, threads=1, quiet=True).fit(texts, ["positive", "objection", "unsubscribe"] * 8)
    engine = build_engine(export_onnx(clf, at / "exported"), engine_name, at / "engine", texts)
    model = Model(clf, before=[Automatic(), CurrentReply()], after=[Stamp()], name="reply-intent").save(at / "model", runtime=engine)
    packages = wheels.build_wheels([str(ROOT)], at / "wheels")
    locked, sources = wheels.lock(wheels.public_closure(engine_name.split()[0], packages), at / "sources")
    golden = [*texts[:3], b"Subject: Automatic reply: x\nAuto-Submitted: auto-replied\n\nout of office until Monday"]
    seal(model, at / "bundle", golden=golden, packages=[*packages, *sources], requirements=locked)
    return at / "bundle"


@pytest.fixture(scope="module", params=["onnxruntime float32", "openvino bfloat16"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle with a wheelhouse beside its Dockerfile."
    at = tmp_path_factory.mktemp("bundle")
    context = shutil.copytree(make_bundle(at, request.param), at / "context")
    download = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--require-hashes", "--no-deps"]
    run(*download, "-d", context / "wheelhouse", "-r", context / "requirements.txt")
    return context


CLIENT = """
import fcntl, json, socket, struct, subprocess, sys, time, urllib.request, os, signal
root, command, env, golden, health = json.load(open(sys.argv[1]))
with socket.socket() as s:  # a new network namespace has nothing but a loopback that is down
    fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 1))
began = time.monotonic()
process = subprocess.Popen(["chroot", "--userspec=10001:10001", root, "/usr/bin/env", "-i", *env, *command])
question = urllib.request.Request("http://127.0.0.1:8080/invocations", json.dumps([g["item"] for g in golden]).encode(), {"Content-Type": "application/json"})
while True:
    try:
        answers = json.load(urllib.request.urlopen(question, timeout=5))["predictions"]
        break
    except OSError:
        if process.poll() is not None or time.monotonic() - began > 60: raise SystemExit(f"it did not answer; exit code {process.poll()}")
        time.sleep(0.01)
ready = time.monotonic() - began
with open(f"/proc/{process.pid}/status") as f: uid = next(line.split()[1] for line in f if line.startswith("Uid"))
try: urllib.request.urlopen("http://192.0.2.1", timeout=2); network = True
except OSError: network = False
try: open(root + "/opt/probe", "w"); writable = True
except OSError: writable = False
health = subprocess.run(["chroot", root, *health], capture_output=True).returncode
process.send_signal(signal.SIGTERM)
began = time.monotonic()
code = process.wait(20)
ended = time.monotonic() - began
print(json.dumps({"ready": ready, "answers": answers, "uid": uid, "network": network, "writable": writable, "health": health, "code": code, "ended": ended}))
"""


def start(buildah: Buildah, image: str, golden: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
    "What comes of starting an image as its configuration says, with the argument that SageMaker gives."
    container = buildah("from", "--pull-never", image)
    root = buildah("mount", container)
    said = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    health = said["Healthcheck"]["Test"]
    (scratch / "start.json").write_text(json.dumps([root, [*said["Entrypoint"], "serve"], said["Env"], golden, health[1:]]))
    (scratch / "client.py").write_text(CLIENT)
    assert said["User"] == "10001:10001" and health[0] == "CMD"
    script = textwrap.dedent(f"""
        set -e
        mount --bind {root} {root}
        mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev && mount --rbind /sys {root}/sys
        mount -o remount,bind,ro {root}
        exec {sys.executable} {scratch}/client.py {scratch}/start.json
    """)
    try:
        return dict(json.loads(run("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "bash", "-c", script, timeout=120).splitlines()[-1]))
    finally:
        buildah("umount", container)
        buildah("rm", container)


def tree_mb(path: Path) -> float:
    return sum(p.lstat().st_size for p in path.rglob("*") if not p.is_symlink() and p.is_file()) / 1e6


def test_the_image_answers_without_network_as_nobody_on_a_read_only_root(
    buildah: Buildah, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from textrelay.secrets import find_secrets
    from textrelay.worker import check_golden

    engine = json.loads((bundle / "model/model.json").read_text())["engine"]
    monkeypatch.setenv("ACME_INDEX_TOKEN", TOKEN)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine index.acme.example login ci password {TOKEN}-netrc\n")
    monkeypatch.setenv("NETRC", str(netrc))
    buildah("bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--build-arg", "BASE=localhost/base", "-t", engine, bundle)
    golden = read_table(bundle / "golden.jsonl")
    found = start(buildah, f"localhost/{engine}", golden, tmp_path)
    check_golden(lambda rows: found["answers"][: len(rows)], golden)
    assert (found["uid"], found["network"], found["writable"], found["health"]) == ("10001", False, False, 0), found
    assert found["code"] in (0, -15), "uvicorn ends in order, then says which signal it was"
    container = buildah("from", "--pull-never", f"localhost/{engine}")
    root = Path(buildah("mount", container))
    try:
        installed = {re.split(r"-\d", p.name)[0].lower() for p in (root / "opt/textrelay").rglob("*.dist-info")}
        assert {"textrelay", "uvicorn", engine} <= installed and not {"torch", "transformers", "mlflow", "pip", "setuptools"} & installed
        assert not {"onnxruntime", "openvino"} - {engine} & installed and not (root / "opt/ml/model/wheelhouse").exists()
        base = Path(tempfile.gettempdir()) / f"textrelay-{SUITE}" / "root"
        size = tree_mb(root) - tree_mb(base) - tree_mb(root / "opt/ml/model/model")
        known = {TOKEN: "the environment", f"{TOKEN}-netrc": "netrc"}
        # Public packages have examples of credentials in their documentation; ours must be nowhere.
        assert [f for f in find_secrets(root, known) if "the value of" in f] == []
        assert find_secrets(root / "opt/ml/model", known) == []
        (root / "opt/textrelay/planted.cfg").write_text(f"index = https://ci:{TOKEN}@index.acme.example/simple\n")
        assert find_secrets(root / "opt/textrelay/planted.cfg", known), "the scan finds what is there"
    finally:
        buildah("umount", container)
        buildah("rm", container)
    print(f"\n{engine}: {size:.0f} MB without base and model (at most {LIMIT_MB[engine]}), "
          f"first right answer after {found['ready']:.2f} s, ended {found['ended']:.2f} s after SIGTERM")
    assert size <= LIMIT_MB[engine]


def test_beside_what_mlflows_own_dockerfile_installs(tmp_path: Path) -> None:
    "The same model as `mlflow models generate-dockerfile` would serve it: what that file installs, in an environment of its own, without its nginx."
    import time
    import urllib.request

    from conftest import free_port, running
    from textrelay import flavor

    bundle = make_bundle(tmp_path / "made", "onnxruntime float32")
    flavor.save_model(bundle, tmp_path / "model")
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    run(sys.executable, "-m", "mlflow", "models", "generate-dockerfile", "-m", tmp_path / "model", "-d", tmp_path / "docker", env=env)
    installs = re.findall(r"(?m)^RUN (pip install .+|python -c .+)$", (tmp_path / "docker/Dockerfile").read_text())
    assert len(installs) == 2, "pip install mlflow, then what the model needs"
    run(sys.executable, "-m", "venv", tmp_path / "environment")
    binaries = tmp_path / "environment/bin"
    path = {"PATH": f"{binaries}{os.pathsep}{env['PATH']}"}
    for line in installs:
        run("bash", "-c", line.replace("/opt/ml/model", str(tmp_path / "model")), env=env | path, cwd=tmp_path / "model")  # the wheels are named from there
    port = free_port()
    question = json.dumps({"dataframe_records": [{"text": "no budget"}]}).encode()
    serve = [str(binaries / "mlflow"), "models", "serve", "-m", str(tmp_path / "model"), "--env-manager", "local", "--port", str(port), "--workers", "1"]
    began = time.monotonic()
    with running(serve, f"http://127.0.0.1:{port}/ping", tmp_path / "log", env | path):
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", question, {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(asked, timeout=60))["predictions"][0]
        ready = time.monotonic() - began
    assert answer["status"] == "scored"
    print(f"\nMLflow's own image: {tree_mb(tmp_path / 'environment'):.0f} MB without base, nginx and model, first right answer after {ready:.2f} s")
