"""The container contract and local endpoints, with real processes.

What one function does is tested under it, in nbs/lib/4*.ipynb and 50_targets.ipynb.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import AWAY, LABELS, TEXTS, free_port, running, seal
from textrelay import targets
from textrelay.core import IntegrityError, read_json, read_table, write_json, write_table
from textrelay.targets import Endpoint, LocalTarget, request

FORBIDDEN = ("torch", "transformers", "mlflow", "papermill", "boto3", "sagemaker", "pandas", "sklearn")


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()


def post(port: int, body: Any, content_type: str, **headers: str) -> tuple[int, Any, Any]:
    return ask(port, "POST", "/invocations", body, {"content-type": content_type, **headers})


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    "Port and log of a real server that remembers nothing, watched for what it imports."
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "textrelay.serving", str(tiny_bundle), "--port", str(port), "--cache", "0"]
    with running(command, f"http://127.0.0.1:{port}/ping", log, {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}):  # of the worker, too
        yield port, log


# The contract ------------------------------------------------------------------------------------------------------------

MESSAGES = [{"id": "m1", "text": "yes call"}, {"id": "m2", "text": "remove this stop"}]
SPLIT = {"dataframe_split": {"columns": ["id", "text"], "data": [["m1", "yes call"], ["m2", "remove this stop"]]}}


@pytest.mark.parametrize(("content_type", "body"), [
    ("application/json", json.dumps(MESSAGES)),
    ("application/json; charset=utf-8", json.dumps({"inputs": MESSAGES})),
    ("application/json", json.dumps(SPLIT)),
    ("application/json", json.dumps({"dataframe_records": MESSAGES})),
    ("application/jsonlines", "\n".join(json.dumps(m) for m in MESSAGES)),
    ("application/x-ndjson", "\n".join(json.dumps(m) for m in MESSAGES) + "\n"),
    ("application/jsonl", "\n".join(json.dumps(m) for m in MESSAGES)),
    ("text/csv", "id,text\r\nm1,yes call\r\nm2,remove this stop\r\n"),
])
def test_every_content_type_of_many_messages_gets_the_same_answer(
    server: tuple[int, Path], tiny_bundle: Path, content_type: str, body: str
) -> None:
    status, said, headers = post(server[0], body, content_type)
    release = {k: v for k, v in read_json(tiny_bundle / "release.json").items() if k != "checksum"}
    assert status == 200 and headers["x-textrelay-release"] == release["release"]
    assert said["model"] == {**release, "version": "7", "run_id": "0123abcd", "commit": "4567cdef"}
    assert [(p["id"], p["label"], p["status"], p["reason"], p["cached"]) for p in said["predictions"]] == [
        ("m1", "positive", "scored", None, False), ("m2", "unsubscribe", "scored", None, False)]
    for p in said["predictions"]:
        assert set(p) == {"id", "label", "score", "scores", "status", "reason", "cached", "prediction_id"}
        assert p["score"] == max(p["scores"].values()) and sorted(p["scores"]) == sorted(LABELS)
        digits, _, number = p["prediction_id"].partition("-")
        assert digits == release["release"][7:19] and uuid.UUID(number).version == 7


@pytest.mark.parametrize(("content_type", "body", "labels"), [
    ("application/json", '{"text": "no budget"}', ["objection"]),
    ("application/json", '"no budget"', ["objection"]),
    ("application/json", '["no budget", "stop remove"]', ["objection", "unsubscribe"]),
    ("text/plain", "no budget", ["objection"]),
    ("text/csv", "no budget\nstop remove\n", ["objection", "unsubscribe"]),
    ("text/csv; header=absent", "no budget\n", ["objection"]),
    ("application/json", json.dumps({"raw": AWAY}), [None]),
    ("message/rfc822", AWAY, [None]),
    ("message/rfc822", b"Subject: Re: offer\r\nContent-Type: text/plain; charset=iso-8859-1\r\n\r\nno budget \xe9\r\n", ["objection"]),
])
def test_other_forms_of_messages(server: tuple[int, Path], content_type: str, body: Any, labels: list[str | None]) -> None:
    status, said, _ = post(server[0], body, content_type)
    assert status == 200 and [p["label"] for p in said["predictions"]] == labels
    assert [p["id"] for p in said["predictions"]] == [str(n) for n in range(len(labels))]


def test_curl_posts_a_mail_file_as_it_is(server: tuple[int, Path], tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    (tmp_path / "mail.eml").write_bytes(AWAY.replace("\n", "\r\n").encode())
    command = f"curl -s --data-binary @mail.eml -H 'content-type: message/rfc822' http://127.0.0.1:{server[0]}/invocations"
    out = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ, "no_proxy": "*"})
    row = json.loads(out.stdout)["predictions"][0]
    assert (row["status"], row["reason"], row["label"]) == ("suppressed", "automatic:out_of_office", None)


@pytest.mark.parametrize(("status", "says", "content_type", "body"), [
    (400, "row 1: expected one of 'text'", "application/json", '["ok", {"txt": "SECRET"}]'),
    (400, "row 0: field 'id'", "application/json", '{"text": "SECRET", "id": [1]}'),
    (400, "not valid JSON", "application/json", '{"text": "SECRET'),
    (400, "line 2: not valid JSON", "application/jsonlines", '{"text": "a"}\nSECRET'),
    (400, "row 1: expected 2 fields", "text/csv", "id,text\n1,a\nSECRET\n"),
    (400, "not utf-8", "text/plain", b"SECRET \xff"),
    (400, "no messages", "application/json", "[]"),
    (400, "no messages", "text/plain", ""),
    (413, "at most 10000 messages, found 10001", "application/json", json.dumps(["SECRET"] * 10_001)),
    (413, "at most 6291456 bytes", "text/plain", b"x" * 6_291_457),
    (415, "expected one of application/json", "application/x-www-form-urlencoded", "SECRET"),
])
def test_wrong_requests_are_told_why(server: tuple[int, Path], status: int, says: str, content_type: str, body: Any) -> None:
    code, said, _ = post(server[0], body, content_type)
    assert (code, list(said)) == (status, ["error"]) and says in said["error"] and "SECRET" not in said["error"]


def test_a_body_without_a_length_is_counted(server: tuple[int, Path]) -> None:
    code, said, _ = post(server[0], (b"x" * 2**20 for _ in range(7)), "text/plain")
    assert code == 413 and "at most 6291456 bytes" in said["error"]
    assert post(server[0], (b"no bud", b"get"), "text/plain")[1]["predictions"][0]["label"] == "objection"


def test_compressed_bodies_unknown_paths_and_methods(server: tuple[int, Path]) -> None:
    code, said, _ = post(server[0], b"\x1f\x8b", "application/json", **{"content-encoding": "gzip"})
    assert code == 415 and "compressed" in said["error"]
    assert ask(server[0], "GET", "/models")[:2] == (404, {"error": "Not Found"})
    code, said, headers = ask(server[0], "GET", "/invocations")
    assert (code, said, headers["allow"]) == (405, {"error": "Method Not Allowed"}, "POST")


def test_the_server_imports_nothing_that_made_the_model_and_logs_no_message(server: tuple[int, Path]) -> None:
    port, log = server
    assert post(port, '"SECRET budget"', "application/json")[0] == 200
    facts = '"method": "POST", "path": "/invocations", "status": 200, "variant": "AllTraffic", "rows": 1, "ms": '
    line_of_request = re.compile(rf'"event": "request", {facts}[\d.]+}}$', re.M)
    deadline = time.monotonic() + 10
    while not line_of_request.search(log.read_text()) and time.monotonic() < deadline:  # it is written after the answer
        time.sleep(0.02)
    lines = log.read_text().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert {"textrelay.filters", "httptools", "uvicorn", "onnxruntime", "tokenizers"} <= imported
    assert not {name for name in imported if name.split(".")[0] in FORBIDDEN}
    assert line_of_request.search("\n".join(lines))
    assert "SECRET" not in "\n".join(lines)


# What nobody should send


def request_of(body: bytes, content_type: str = "application/json", length: int | None = None, more: str = "") -> bytes:
    head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {content_type}\r\n{more}"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


KINDS = ("application/json", "application/jsonlines", "text/csv", "message/rfc822", "text/plain", "application/json; charset=utf-16",
         "text/csv; header=present", "a/b", "", ";;=")
ODD = (b"1" * 10_000, b"1e999", b"NaN", b"null", b"[null]", b'"\\ud800"', b'"\\u0000"', b'["\x00"]', b'{"text": "a", "headers": {"a": 1}}',
       b'[{"text": "a", "more": NaN}, {"text": "b"}]', b'[{"text": "a", "headers": {"x": "\\udc80"}}, {"text": "b"}]',
       json.dumps([{"text": "a" * 2000, "more": float("nan")}, *({"text": "b" * 2000} for _ in range(40))]).encode())
PART = b"--a\nContent-Type: multipart/mixed; boundary=a\n\n"


def hostile(draw: random.Random) -> tuple[bytes, bool]:
    "A request that something is wrong with, or may be, and whether more of it could come."
    noise, good = draw.randbytes(draw.randrange(400)), b'[{"id": "m1", "text": "yes call"}, {"raw": "Subject: x\\n\\nno budget"}]'
    spoilt = bytearray(good)
    for _ in range(draw.randrange(1, 6)):
        spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
    whole = [
        lambda: request_of(bytes(spoilt), draw.choice(KINDS)),
        lambda: request_of(noise, draw.choice(KINDS)),
        lambda: request_of(b" " * 7_000_000),
        lambda: request_of(draw.choice([b"[", b'{"inputs":', b'{"text":[']) * draw.randrange(1, 100_000)),
        lambda: request_of(draw.choice(ODD)),
        lambda: request_of(gzip.compress(bytes(10_000_000)), more="Content-Encoding: gzip\r\n"),
        lambda: request_of(PART.replace(b"--a\n", b"") + PART * draw.randrange(2000), "message/rfc822"),
    ]
    part = [
        lambda: request_of(good[: draw.randrange(len(good))], length=len(good)),  # the connection is closed in the middle
        lambda: request_of(b"x", length=draw.choice([-1, 10**9, 10**30])),
        lambda: draw.choice([noise, b"POST /invocations HTTP/1.1\r\nX: " + b"y" * 70_000, b"\r\n" * 1000]),
    ]
    n = draw.randrange(len(whole) + len(part))
    return (whole[n](), False) if n < len(whole) else (part[n - len(whole)](), True)


def status_of(port: int, sent: bytes, more: bool) -> int | None:
    "What a raw request is answered with; None: the connection was closed without an answer, which is fine for half a request."
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
        with contextlib.suppress(OSError):  # a server that has read enough answers and hangs up; then shutdown finds no connection
            s.sendall(sent)
            if more:
                s.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := s.recv(65536):
                answer += part
    return int(answer.split()[1]) if answer.startswith(b"HTTP/") else None


def memory_of(pid: int) -> int:
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(p.memory_info().rss for p in family)


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_generated_bad_requests_do_no_harm(tiny_bundle: Path, tmp_path: Path, n: int) -> None:
    "Three quarters raw bytes, the rest by schemathesis from the OpenAPI page (it makes at least that many); a good client beside them always gets its answer."
    port, log, stop = free_port(), tmp_path / "log", threading.Event()
    url, draw, seen = f"http://127.0.0.1:{port}", random.Random(n), Counter[int | None]()
    with running([sys.executable, "-m", "textrelay.serving", str(tiny_bundle), "--port", str(port), "--cache", "0"], f"{url}/ping", log) as process:
        def good() -> int:
            right = 0
            while not stop.wait(0.05):
                status, said, _ = post(port, "remove this stop", "text/plain")
                assert (status, said["predictions"][0]["label"]) == (200, "unsubscribe")
                right += 1
            return right

        seen.update(status_of(port, *hostile(draw)) for _ in range(100))  # the server's buffers grow once
        memory = memory_of(process.pid)
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(good)
            try:
                seen.update(status_of(port, *hostile(draw)) for _ in range(n * 3 // 4))
                checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
                options = ["--checks", checks, "--max-examples", str(n // 4), "--mode", "all", "--phases", "coverage,fuzzing", "--seed", "1"]
                command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", *options]
                done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
            finally:
                stop.set()
        assert done.returncode == 0, done.stdout
        grown = (memory_of(process.pid) - memory) / 1e6
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    print(f"{sum(seen.values())} raw: {dict(seen)}; {len(lines)} lines of log, {beside.result()} good requests beside, memory {grown:+.1f} MB")
    assert beside.result() > 5 and set(seen) - {None} <= {200, 400, 404, 405, 408, 413, 415, 431} and seen[400] > 10 and seen[413] > 5 and seen[415] > 5
    assert not [line for line in lines if line["event"] == "error" or line.get("status", 0) >= 500]
    assert grown < 40


def test_sigterm_ends_the_server_after_what_it_has_begun(tiny_bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "textrelay.serving", str(tiny_bundle), "--port", str(port), "serve"]
    with running(command, f"http://127.0.0.1:{port}/ping", tmp_path / "log") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM) and "Traceback" not in (tmp_path / "log").read_text()


GATED = """
import pathlib, time
from textrelay.filters import Filter

class Gate(Filter):
    "Holds a batch until a file appears."
    def __init__(self, folder):
        self.folder = folder
    def transform(self, X):
        (pathlib.Path(self.folder) / "entered").touch()
        while not (pathlib.Path(self.folder) / "open").exists():
            time.sleep(0.01)
        return list(X)
"""


def test_a_duplicate_is_answered_from_memory_and_counted(tiny_bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    with running([sys.executable, "-m", "textrelay.serving", str(tiny_bundle), "--port", str(port)], f"http://127.0.0.1:{port}/ping", tmp_path / "log"):
        first, = post(port, '[{"text": "no budget", "id": "a"}]', "application/json")[1]["predictions"]
        again, = post(port, "id,text\nb,no budget\n", "text/csv")[1]["predictions"]
        assert again == {**first, "id": "b", "cached": True} and first["cached"] is False
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
            seen = {(m.name, *sorted(m.labels.values())): m.value for f in text_string_to_metric_families(page.read().decode()) for m in f.samples}
        assert seen[("textrelay_requests_total", "200", "AllTraffic")] == seen[("textrelay_rows_total", "", "AllTraffic", "scored")] == 2
        assert seen[("textrelay_cached_rows_total", "AllTraffic")] == 1


def test_a_slow_sender_is_told_and_holds_nobody_up(tiny_bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "textrelay.serving", str(tiny_bundle), "--port", str(port), "--timeout", "3"]
    with running(command, f"http://127.0.0.1:{port}/ping", tmp_path / "log"), socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nno bud")
        assert post(port, "no budget", "text/plain")[0] == 200
        answer = b"".join(iter(lambda: slow.recv(65536), b""))  # to the end: such a connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ") and b"within 3 s" in answer


def test_a_full_queue_answers_503_at_once_and_ping_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle / "model", tmp_path / "model")
    (tmp_path / "privatefilters.py").write_text(GATED)
    saved = read_json(tmp_path / "model" / "model.json")
    saved["before"].append({"class": "privatefilters.Gate", "params": {"folder": str(tmp_path)}})
    write_json(tmp_path / "model" / "model.json", saved)
    port = free_port()
    command = [sys.executable, "-m", "textrelay.serving", str(tmp_path / "model"), "--port", str(port), "--queue", "1", "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with running(command, f"http://127.0.0.1:{port}/ping", tmp_path / "log", env), ThreadPoolExecutor(3) as pool:
        try:
            first = pool.submit(post, port, "no budget", "text/plain")
            while not (tmp_path / "entered").exists():
                time.sleep(0.01)
            others = [pool.submit(post, port, "no budget", "text/plain") for _ in range(2)]  # one may wait, the other is one too many
            done, waiting = wait(others, timeout=30, return_when=FIRST_COMPLETED)
            assert len(done) == len(waiting) == 1 and not first.done()
            code, said, headers = done.pop().result()
            assert (code, headers["retry-after"]) == (503, "1") and "overloaded" in said["error"]
            assert ask(port, "GET", "/ping")[0] == 200
        finally:
            (tmp_path / "open").touch()
        assert [first.result()[0], waiting.pop().result()[0]] == [200, 200]


@pytest.mark.parametrize("broken", ["nothing_there", "changed_file"])
def test_what_cannot_be_served_is_one_line_and_exit_code_1(tiny_bundle: Path, tmp_path: Path, broken: str) -> None:
    if broken == "changed_file":
        shutil.copytree(tiny_bundle, tmp_path / broken)
        (tmp_path / broken / "golden.jsonl").write_text("")
    out = subprocess.run([sys.executable, "-m", "textrelay.serving", str(tmp_path / broken)], capture_output=True, text=True, check=False)
    says = {"nothing_there": "neither a bundle", "changed_file": "changed: golden.jsonl"}[broken]
    assert out.returncode == 1 and out.stderr.startswith("error: ") and says in out.stderr and len(out.stderr.splitlines()) == 1


# Local endpoints -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Iterator[LocalTarget]:
    target = LocalTarget(tmp_path / "home")
    yield target
    for endpoint in target.endpoints():
        target.delete(endpoint.name)


def works(endpoint: Endpoint) -> bool:
    return [row["label"] for row in request(endpoint.url, TEXTS[:3])] == LABELS


def test_deploy_list_and_delete(target: LocalTarget, another: Callable[[str], Path]) -> None:
    source = another("1")
    one = target.deploy(source, "reply-intent")
    shutil.rmtree(source)  # the endpoint has its own copy
    assert works(one) and target.endpoints() == [one] and one.status == "running" and one.facts["version"] == "1"
    two = target.deploy(another("2"), "other")
    assert two.port != one.port and target.endpoints() == [two, one]
    with pytest.raises(ValueError, match=r"no endpoint 'nope'; there are \['other', 'reply-intent'\]"):
        target.delete("nope")
    target.delete("reply-intent")
    assert target.endpoints() == [two] and not (target.folder / "reply-intent").exists()
    with pytest.raises(RuntimeError, match="did not answer"):
        request(one.url, ["hello"])


def test_the_same_release_again_is_left_as_it_is(target: LocalTarget, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = target.deploy(tiny_bundle, "reply-intent")
    assert target.deploy(tiny_bundle, "reply-intent") == one
    assert "already serves" in capsys.readouterr().err


def test_another_release_keeps_the_port(target: LocalTarget, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    port = free_port()
    one = target.deploy(tiny_bundle, "reply-intent", port=port)
    two = target.deploy(another("8"), "reply-intent")
    assert one.port == two.port == port and one.pid == two.pid and one.release != two.release and works(two)
    three = target.deploy(another("9"), "reply-intent")
    assert {p.name for p in (target.folder / "reply-intent").iterdir() if p.is_dir()} == {two.release[7:23], three.release[7:23]}, "one back is kept"


def with_gate(folder: Path, at: Path) -> Path:
    "Another release, whose answers wait for `at`/open."
    saved = read_json(folder / "model" / "model.json")
    write_json(folder / "model" / "model.json", {**saved, "before": [*saved["before"], {"class": "privatefilters.Gate", "params": {"folder": str(at)}}]})
    return seal(folder, version="gated")


def test_a_deployment_does_not_wait_for_what_the_release_before_has_in_hand(
    target: LocalTarget, another: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "privatefilters.py").write_text(GATED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "open").touch()
    one = target.deploy(with_gate(another("gated"), tmp_path), "reply-intent")
    for name in ("open", "entered"):
        (tmp_path / name).unlink()
    with ThreadPoolExecutor(1) as pool:
        try:
            first = pool.submit(post, one.port, "no budget", "text/plain")
            while not (tmp_path / "entered").exists():
                assert not first.done(), first.result()
                time.sleep(0.01)
            two = target.deploy(another("8"), "reply-intent")
            assert not first.done() and works(two) and target.endpoints() == [two]
        finally:
            (tmp_path / "open").touch()
        status, said, _ = first.result()
        assert status == 200 and said["model"]["release"] == one.release, "the old one still answers what it was asked"


def test_settings_that_cannot_be_are_told_as_they_are(target: LocalTarget, tiny_bundle: Path) -> None:
    one = target.deploy(tiny_bundle, "reply-intent")
    for options, says in (({"capture": 0.5, "redact": "nope.x"}, "no module 'nope'"), ({"workers": "2"}, "workers '2': expected a whole number, 1 to 64")):
        with pytest.raises(RuntimeError, match=re.escape(says)):
            target.deploy(tiny_bundle, "reply-intent", options=options)
    assert target.endpoints() == [one] and works(one)


def changed_file(folder: Path) -> None:
    with open(folder / "model" / "runtime" / "model.onnx", "ab") as f:
        f.write(b"x")


def wrong_golden_row(folder: Path) -> None:
    rows = read_table(folder / "golden.jsonl")
    rows[2]["expected"]["label"] = "positive"
    write_table(folder / "golden.jsonl", rows)
    seal(folder)


def score_off_by_one_thousandth(folder: Path) -> None:
    rows = read_table(folder / "golden.jsonl")
    rows[0]["expected"]["scores"]["positive"] += 1e-3
    write_table(folder / "golden.jsonl", rows)
    seal(folder)


def filter_that_is_not_installed(folder: Path) -> None:
    saved = read_json(folder / "model" / "model.json")
    write_json(folder / "model" / "model.json", {**saved, "before": [{"class": "nosuchpackage.Filter", "params": {}}]})
    seal(folder)


@pytest.mark.parametrize(("harm", "error", "says"), [
    (changed_file, IntegrityError, "changed: model/runtime/model.onnx"),
    (wrong_golden_row, RuntimeError, "row 2: label 'unsubscribe' instead of 'positive'"),
    (score_off_by_one_thousandth, RuntimeError, "row 0: score of 'positive'"),
    (filter_that_is_not_installed, RuntimeError, "no module 'nosuchpackage' is installed"),
])
def test_a_broken_bundle_leaves_the_old_one_serving(
    target: LocalTarget, tiny_bundle: Path, another: Callable[[str], Path], harm: Callable[[Path], None], error: type[Exception], says: str
) -> None:
    one = target.deploy(tiny_bundle, "reply-intent")
    harm(broken := another("broken"))
    for name in ("reply-intent", "new"):
        with pytest.raises(error, match=re.escape(says)):
            target.deploy(broken, name)
    assert target.endpoints() == [one] and works(one)
    assert not (target.folder / "new").exists()
    assert [p.name for p in (target.folder / "reply-intent").iterdir() if p.is_dir()] == [one.release[7:23]]


def test_a_dead_process_is_listed_as_dead_and_can_be_replaced(target: LocalTarget, tiny_bundle: Path) -> None:
    one = target.deploy(tiny_bundle, "reply-intent")
    os.kill(one.pid, signal.SIGKILL)
    while target.endpoints()[0].status == "running":
        time.sleep(0.02)
    assert target.endpoints()[0].status == "dead"
    two = target.deploy(tiny_bundle, "reply-intent")
    assert two.port == one.port and two.pid != one.pid and target.endpoints() == [two]


def test_a_hung_front_is_dead_and_is_killed_for_its_port(
    target: LocalTarget, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_stop", partial(targets._stop, timeout_s=0.5))
    one = target.deploy(tiny_bundle, "reply-intent")
    os.kill(one.pid, signal.SIGSTOP)
    assert target.endpoints()[0].status == "dead"
    two = target.deploy(tiny_bundle, "reply-intent")
    assert two.port == one.port and two.pid != one.pid and target.endpoints() == [two]


def test_somebody_elses_process_is_neither_believed_nor_killed(target: LocalTarget, tiny_bundle: Path) -> None:
    one = target.deploy(tiny_bundle, "reply-intent")
    state = target.folder / "reply-intent.json"
    saved = read_json(state)
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write_json(state, {**saved, "pid": stranger.pid})
        assert target.endpoints()[0].status == "dead"
        with pytest.raises(RuntimeError, match="used by another program"):
            target.deploy(tiny_bundle, "reply-intent")
        assert stranger.poll() is None
    finally:
        write_json(state, saved)
        stranger.kill()
        stranger.communicate()
    assert target.endpoints() == [one]


def test_two_deployments_at_a_time_take_turns(target: LocalTarget, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    failures: list[BaseException] = []

    def deploy(bundle: Path, name: str) -> None:
        try:
            target.deploy(bundle, name)
        except BaseException as e:  # a thread's error must reach the test
            failures.append(e)

    jobs = [(tiny_bundle, "a"), (another("2"), "a"), (another("3"), "b")]
    threads = [threading.Thread(target=deploy, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    a, b = target.endpoints()
    assert (a.status, b.status) == ("running", "running") and a.port != b.port and works(a) and works(b)


def test_targets_that_know_nothing_of_each_other_get_ports_of_their_own(tiny_bundle: Path, tmp_path: Path) -> None:
    places = [LocalTarget(tmp_path / name) for name in "abc"]
    try:
        with ThreadPoolExecutor(3) as pool:
            endpoints = list(pool.map(lambda place: place.deploy(tiny_bundle, "same"), places))
        assert len({e.port for e in endpoints}) == 3 and all(map(works, endpoints))
        first = min(zip(places, endpoints, strict=True), key=lambda pair: pair[1].port)
        first[0].delete("same")
        assert first[0].deploy(tiny_bundle, "same").port == first[1].port, "its last connections linger, and it is the first that is free all the same"
    finally:
        for place in places:
            if place.find("same"):
                place.delete("same")


def test_a_port_in_use_is_an_error_before_anything_starts(target: LocalTarget, tiny_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError, match="is in use"):
            target.deploy(tiny_bundle, "reply-intent", port=taken.getsockname()[1])
    assert target.endpoints() == []


# Change under load -------------------------------------------------------------------------------------------------------


def clients(url: str, connections: int, stop: threading.Event) -> tuple[list[threading.Thread], Counter[str]]:
    "Clients that ask, wait and ask again on a connection each; what came of it, by what the client saw."
    seen: Counter[str] = Counter()
    port = int(url.rpartition(":")[2])

    def one(k: int) -> None:
        draw, connection = random.Random(k), http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while not stop.is_set():
            n = draw.randrange(len(TEXTS))
            try:
                connection.request("POST", "/invocations", TEXTS[n], {"content-type": "text/plain"})
                answer = connection.getresponse()
                said = json.loads(answer.read())
                right = answer.status == 200 and said["predictions"][0]["label"] == LABELS[n % 3] and said["model"]["release"] == answer.headers["x-textrelay-release"]
                seen[f"right, version {said['model']['version']}" if right else f"wrong: {answer.status} {said}"[:200]] += 1
            except (OSError, http.client.HTTPException, ValueError) as e:
                seen[f"failed: {type(e).__name__} {e}"] += 1
                connection.close()
        connection.close()

    threads = [threading.Thread(target=one, args=(k,)) for k in range(connections)]
    for thread in threads:
        thread.start()
    return threads, seen


@pytest.mark.parametrize("seconds", [12, pytest.param(60, marks=pytest.mark.soak)])
def test_no_request_is_lost_or_wrong_while_everything_changes(
    target: LocalTarget, tiny_bundle: Path, another: Callable[[str], Path], seconds: int
) -> None:
    "Three deployments, a rollback, a broken model, a candidate, and workers that are killed, under load."
    one, stop = target.deploy(tiny_bundle, "busy", options={"cache": 0}), threading.Event()
    wrong_golden_row(broken := another("broken"))

    def kill_a_worker() -> None:
        front = psutil.Process(one.pid)
        os.kill(next(p.pid for p in front.children() if "textrelay.worker" in p.cmdline()), signal.SIGKILL)

    def refused() -> None:
        with pytest.raises(RuntimeError, match="row 2: label"):
            target.deploy(broken, "busy")

    acts = [
        lambda: target.deploy(another("8"), "busy"), kill_a_worker, lambda: target.deploy(another("9"), "busy"), refused, lambda: target.rollback("busy"),
        lambda: target.deploy(another("10"), "busy", share=0.3), kill_a_worker, lambda: target.shift("busy", 1)]
    threads, seen = clients(one.url, 32, stop)
    try:
        began = time.monotonic()
        for n, act in enumerate(acts, 1):
            time.sleep(max(0, began + n * seconds / (len(acts) + 1) - time.monotonic()))
            act()
        time.sleep(max(0, began + seconds - time.monotonic()))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    print(f"{sum(seen.values())} answers: {dict(seen)}")
    assert set(seen) == {f"right, version {v}" for v in ("7", "8", "9", "10")}, seen
    assert target.endpoints()[0].facts["version"] == "10" and target.status("busy")["live"]["variants"]["current"]["workers"] == 1


def test_a_deployment_that_is_cut_off_leaves_an_endpoint_that_works(target: LocalTarget, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    one, two = target.deploy(tiny_bundle, "reply-intent"), another("2")
    command = [sys.executable, "-m", "textrelay.cli", "deploy", str(two), "reply-intent"]
    for after_s in (0.3, 0.6, 0.9, 1.2, 1.5):
        deploying = subprocess.Popen(command, env={**os.environ, "TEXTRELAY_HOME": str(target.home)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(after_s)
        deploying.kill()
        deploying.wait()
        assert works(one)
        now, = target.endpoints()
        assert now.status == "running" and now.facts["version"] in ("7", "2") and now.pid == one.pid
    assert target.deploy(two, "reply-intent").facts["version"] == "2" and works(one)


def test_what_an_endpoint_recorded_is_published_consumed_and_scored_again(
    target: LocalTarget, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from textrelay import exchange
    from textrelay.capture import read_capture
    from textrelay.model import Model

    monkeypatch.setenv("TEXTRELAY_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    one = target.deploy(tiny_bundle, "recorded", options={"capture": 1})
    secret = "no budget, write to jo.doe@example.com or call 0151 2345678"
    deadline = time.monotonic() + 30
    while not list(target.captured("recorded").rglob("*.jsonl")) and time.monotonic() < deadline:  # the recorder is not waited for
        request(one.url, [{"text": secret, "id": "m1"}, AWAY.encode(), "stop remove"])
        time.sleep(0.2)
    target.delete("recorded")
    published = exchange.publish(target.captured("recorded"), "live-mail")
    rows = list(read_capture(exchange.consume(published.reference)))
    assert [(r["status"], r["label"]) for r in rows[:3]] == [("scored", "objection"), ("suppressed", None), ("scored", "unsubscribe")]
    assert rows[0]["id"] == "m1" and rows[0]["release"] == one.release and "jo.doe" not in str(rows) and "2345678" not in str(rows)
    again = Model.load(tiny_bundle).answer(rows[:3])
    assert [(r["status"], r["label"], r["reason"]) for r in again] == [(r["status"], r["label"], r["reason"]) for r in rows[:3]]
    table = tmp_path / "live.jsonl"
    subprocess.run([sys.executable, "-m", "textrelay.cli", "captured", str(target.captured("recorded")), str(table)], check=True)
    assert len(read_table(table)) == len(rows)


def test_a_shadow_is_asked_and_counted_and_never_answers(target: LocalTarget, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    one = target.deploy(tiny_bundle, "watched", options={"cache": 0})
    target.deploy(another("2"), "watched", shadow=True)
    assert works(one) and works(one)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{one.url}/metrics", timeout=30) as page:
            counted = [m for f in text_string_to_metric_families(page.read().decode()) for m in f.samples]
        found = {m.labels["outcome"]: m.value for m in counted if m.name == "textrelay_shadow_rows_total"}
        if found.get("same") == 6:
            break
        time.sleep(0.05)
    assert found == {"same": 6}
    assert ask(one.port, "GET", "/ping")[1]["model"]["version"] == "7"


@pytest.mark.soak
def test_mlflow_serves_the_bundle_with_the_same_answers(target: LocalTarget, tiny_bundle: Path, tmp_path: Path) -> None:
    from textrelay import flavor

    flavor.save_model(tiny_bundle, tmp_path / "model")
    rows = [*({"id": f"m{n}", "text": text} for n, text in enumerate([*TEXTS, "", "> quoted only", "no budget " * 500])), {"id": "raw", "raw": AWAY}]
    ours = request(target.deploy(tiny_bundle, "ours").url, rows, fresh=True)
    port = free_port()
    words = f"-m mlflow models serve -m {tmp_path / 'model'} --env-manager local --host 127.0.0.1 --port {port} --workers 1".split()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    theirs: list[dict[str, Any]] = []
    with running([sys.executable, *words], f"http://127.0.0.1:{port}/ping", tmp_path / "log", env):
        columns = ["id", "text", "raw"]
        body = {"dataframe_split": {"columns": columns, "data": [[row.get(c) for c in columns] for row in rows]}}
        theirs = post(port, json.dumps(body), "application/json")[1]["predictions"]
    assert len(theirs) == len(ours) and {row["status"] for row in ours} == {"scored", "suppressed"}
    for mine, other in zip(ours, theirs, strict=True):
        assert [mine[k] for k in ("id", "label", "status", "reason")] == [other[k] for k in ("id", "label", "status", "reason")]
        assert mine["scores"] == pytest.approx(other["scores"], abs=1e-6) if mine["scores"] else not other["scores"]
