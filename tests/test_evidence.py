"""The release page: complete, in one file, and without an outside request, as its HTML says and as a browser does it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from conftest import LABELS, ROOT, TEXTS, seal
from textrelay.core import read_json, write_json, write_table
from textrelay.metrics import Scores, write_scores

COMMITS = {"1": "1" * 40, "2": "2" * 40}


def scores(wrong_every: int, folder: Path, name: str) -> Path:
    y = np.array([LABELS[n % 3] for n in range(90)])
    P = np.array([[0.8 if label == c else 0.1 for c in LABELS] for label in y])
    P[::wrong_every] = np.roll(P[::wrong_every], 1, axis=1)
    P[:4] = np.nan
    status, reason = ["suppressed"] * 4 + ["scored"] * 86, ["automatic:bounce"] * 4 + [None] * 86
    return write_scores(folder / name, Scores([str(n) for n in range(90)], y, LABELS, P, status, reason, np.full(90, 3.0), "sha256:" + "d" * 64, "sha256:" + "e" * 64))


def notebook(folder: Path, stage: str, number: str) -> Path:
    hostile = "<script>document.title = 'ran'</script><img src='http://outside.example/x.png'><iframe src='http://outside.example/'></iframe><p style='background: url(http://outside.example/y)'>kept"
    cells = [nbformat.v4.new_markdown_cell(f"# The {stage} report"), nbformat.v4.new_code_cell(f"rate = {number}", id="abcd1234", outputs=[
        nbformat.v4.new_output("display_data", {"text/html": hostile}), nbformat.v4.new_output("stream", name="stdout", text=f"{stage} <printed> {number}")])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{stage}.ipynb")
    return folder / f"{stage}.ipynb"


def stage_run(folder: Path, stage: str, number: str, params: dict[str, str], result: dict[str, Any], files: list[Path], **tags: str) -> str:
    "A stage's run as the runner leaves it."
    from textrelay.exchange import experiment, store

    client = store()
    told = {"stage": stage, "notebook": f"nbs/stages/{stage}.ipynb", "key_of": f'{{"params": "sha256:{stage}", "notebook": "sha256:{stage} cells"}}',
            "commit": COMMITS[number], "dirty": "false", "verdict": "PASS", **tags}
    run_id = str(client.create_run(experiment(), tags={"mlflow.user": "robin", **{f"textrelay.{k}": v for k, v in told.items()}}).info.run_id)
    for name, value in params.items():
        client.log_param(run_id, name, value)
    client.log_dict(run_id, {"stage": stage, "run_id": run_id, "verdict": "PASS", **result}, "result.json")
    client.log_artifact(run_id, str(notebook(folder, stage, number)), "notebook")
    for file in files:
        client.log_artifact(run_id, str(file))
    client.log_metric(run_id, "mail.held_back.bounce", 0.75)
    client.set_terminated(run_id)
    return run_id


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("evidence")
        (home / ".textrelay").mkdir()  # the top of a project
        patch.chdir(home)
        patch.setenv("TEXTRELAY_HOME", str(home / "state"))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        yield home


@pytest.fixture(scope="module")
def releases(state: Path, tiny_bundle: Path) -> dict[str, str]:
    "Two releases, the second one judged against the first; another library cell, parameter, package and table."
    from textrelay import exchange
    from textrelay.flavor import log_model
    from textrelay.registry import claim, close, entries, history, register

    found: dict[str, str] = {}
    for number in ("1", "2"):
        folder = state / number
        (folder / "bundle/wheels").mkdir(parents=True)
        rows = [{"text": f"{text} {k}", "label": label} for k in range(10 + int(number)) for text, label in zip(TEXTS, LABELS * 2, strict=True)]
        write_table(folder / "table.csv", rows)
        published, _ = exchange.obtain(str(folder / "table.csv"), "replies")
        bundle = Path(shutil.copytree(tiny_bundle, folder / "bundle", dirs_exist_ok=True))
        with zipfile.ZipFile(bundle / "wheels/acme-1-py3-none-any.whl", "w") as z:
            z.writestr("acme/filters.py", f"# %% ../nbs/filters.ipynb #0a1b\nfloor = 0.{number}\n\n# %% ../nbs/filters.ipynb #2c3d\nsame = True\n")
        (bundle / "requirements.txt").write_text(f"numpy==2.{number}.0 --hash=sha256:aa\nlxml==6.0.0 --hash=sha256:bb\n")
        packages = [{"name": "acme", "version": "1", "wheel": "acme-1-py3-none-any.whl", "source": "git+https://git.acme.example/filters.git", "commit": "c" * 40}]
        write_json(bundle / "provenance.json", {"commit": COMMITS[number], "dirty": False, "tag": None, "dataset": published.digest, "trained": "sha256:" + "a" * 64,
                                                "params": "sha256:" + "b" * 64, "python": "3.11", "platform": "linux", "packages": packages})
        train = stage_run(folder, "train", number, {"epochs": number, "rows": "null", "allowed_signers": "signers"}, {"dataset": published.reference, "reading": {}}, [])
        test = stage_run(folder, "test", number, {"train": train, "worst": "10"}, {"why": "PASS         accuracy is 0.9; at least 0.6 is required"}, [])
        files = [scores(12, folder, "scores.csv"), *([scores(6, folder, "champion.csv")] if found else [])]
        judged = f'{{"champion": "{found.get("1", "none")}"}}'
        wrap = stage_run(folder, "wrap", number, {"train": train, "test": test, "gates": f"rules of {number}"},
                         {"why": "PASS         f1_macro: as good", "engine": "torch"}, files, found=judged)
        seal(bundle, version=number, run_id=wrap, commit=COMMITS[number])
        with pytest.MonkeyPatch.context() as kernel:
            kernel.setenv("MLFLOW_RUN_ID", wrap)  # as in the stage's kernel: the version is of that run
            logged = log_model(bundle, "sealed", registered_model_name="reply-intent")
        found[number] = register("reply-intent", str(logged.registered_model_version), read_json(bundle / "release.json")["release"]).release
        change = claim(entries("reply-intent")[0], "staging", seen=history("reply-intent", "staging"), endpoint="replies-staging")
        close(change, "in force")
        stage_run(folder, "deploy", number, {"wrap": wrap, "alias": "staging"}, {"endpoint": "replies-staging", "url": "http://127.0.0.1:1", "alias": "staging"}, [])
        stage_run(folder, "deploy", number, {"wrap": wrap, "alias": "production"}, {}, [], verdict="REFUSED")  # leaves no result
    return found


@pytest.fixture(scope="module")
def approved(state: Path, releases: dict[str, str]) -> None:
    from textrelay.approvals import approve
    from textrelay.evidence import Release

    for who in ("ann", "bob"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(state / who)], check=True)
    signers = state / "signers"
    signers.write_text("".join(f'{who}@acme.example namespaces="textrelay" {(state / f"{who}.pub").read_text()}' for who in ("ann", "bob")))
    built = {"data": Release.find(releases["2"]).origin["dataset"]}
    for stage in ("train", "test", "wrap"):
        built |= {stage: f"sha256:{stage}", f"{stage} notebook": f"sha256:{stage} cells"}
    approve("build", COMMITS["2"], by="ann@acme.example", key=state / "ann", reason="reviewed & read", allowed_signers=signers, facts=built)
    other = {**built, "data": "sha256:other", "train": "sha256:other"}
    approve("build", COMMITS["2"], by="bob@acme.example", key=state / "bob", reason="the same commit on other data", allowed_signers=signers, facts=other)
    approve("promote", releases["2"], by="bob@acme.example", key=state / "bob", reason="not judged yet", allowed_signers=signers)
    yes = approve("promote", releases["2"], by="bob@acme.example", key=state / "bob", reason="better <everywhere>", allowed_signers=signers, facts={"verdict": "PASS"})
    approve("revoke", yes.id, by="ann@acme.example", key=state / "ann", reason="too early", allowed_signers=signers)


@pytest.fixture(scope="module")
def page(state: Path, releases: dict[str, str], approved: None) -> Path:
    done = subprocess.run([sys.executable, "-m", "textrelay.cli", "evidence", releases["2"][:19], "out.html"], cwd=state, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"runs:/[0-9a-f]{32}/evidence/release.html", done.stdout.strip())
    return state / "out.html"


class Seen(HTMLParser):
    "Text by section, elements, and whatever could be fetched."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tags: set[str] = set()
        self.outside: list[str] = []
        self.section, self.style = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        have = dict(attributes)
        self.tags.add(tag)
        if tag == "section":
            self.section = str(have["id"])
        if tag in ("td", "th"):
            self.handle_data(" ")
        fetched = [v or "" for k, v in attributes if k in ("src", "srcset", "data", "background", "poster", "action") or k == "href" and tag not in ("a",)]
        self.outside += [v for v in fetched if not v.startswith("data:")] + [k for k, _ in attributes if k.startswith("on")]
        self.outside += re.findall(r"url\((?!data:)[^)]*\)|@import", have.get("style") or "")
        self.outside += [v for k, v in attributes if tag == "a" and k == "href" and not str(v).startswith("#")]

    def handle_data(self, data: str) -> None:
        self.sections[self.section] = self.sections.get(self.section, "") + data


def test_the_page_is_complete(page: Path, releases: dict[str, str]) -> None:
    seen = Seen(page.read_text(encoding="utf-8")).sections
    assert set(seen) == {"", "summary", "decision", "metrics", "changes", "filters", "lineage", "approvals", "deployments", "digests", "verify", "notebooks"}
    assert releases["2"] in seen[""] and COMMITS["2"] in seen["summary"] and releases["1"] in seen["summary"] and "ann@acme.example (build)" in seen["summary"]
    assert re.search(r"In force\s+staging", seen["summary"]) and "promote" in seen["deployments"] and "in force" in seen["deployments"]
    assert "at least 0.6 is required" in seen["decision"] and "f1_macro: as good" in seen["decision"]
    row = re.search(r"f1_macro\s*([\d.]+)\s*([\d.]+) to ([\d.]+)\s*([\d.]+)\s*([+-][\d.]+)\s*([+-][\d.]+) to ([+-][\d.]+)", seen["metrics"])
    assert row, seen["metrics"]
    value, low, high, champion, gain, gain_low, gain_high = map(float, row.groups())
    assert low <= value <= high and gain == pytest.approx(value - champion, abs=2e-3) and gain_low <= gain <= gain_high and gain > 0
    assert "f1.unsubscribe" in seen["metrics"] and "McNemar p" in seen["metrics"]
    changed = seen["changes"]
    assert "train.epochs" in changed and "wrap.gates" in changed and "test.worst" not in changed
    assert "nbs/filters.ipynb #0a1b" in changed and "+floor = 0.2" in changed and "#2c3d" not in changed and "nbs/stages/train.ipynb #abcd1234" in changed
    assert re.search(r"replies@1.*replies@2.*: \d+ different rows were added, \d+ are gone", changed, re.DOTALL) and "numpy" in changed and "lxml" not in changed
    assert "suppressed: automatic:bounce" in seen["filters"] and "4.4 %" in seen["filters"] and "75 %" in seen["filters"]
    assert "replies@2" in seen["lineage"] and seen["lineage"].count("robin") == 4
    assert "revoked by ann@acme.example: too early" in seen["approvals"] and "better <everywhere>" in seen["approvals"] and "reviewed & read" in seen["approvals"]
    for reason, counts in {"reviewed & read": "yes", "on other data": "is about other data, train", "not judged yet": "is about other verdict"}.items():
        assert next(line for line in seen["approvals"].splitlines() if reason in line).endswith(f"UTC {counts}"), seen["approvals"]
    assert re.search(r"Approved by\s+ann@acme.example \(build\)\s+Signature", seen["summary"]), "only what counts"
    assert "replies-staging" in seen["deployments"] and "acme-1-py3-none-any.whl" in seen["digests"] and "golden.jsonl" in seen["digests"]
    assert "textrelay verify models:/reply-intent/2" in seen["verify"] and f"textrelay evidence {releases['2'][7:19]} page.html" in seen["verify"]
    assert all(f"The {stage} report" in seen["notebooks"] and f"{stage} <printed> 2" in seen["notebooks"] for stage in ("train", "test", "wrap", "deploy"))


def test_nothing_runs_and_nothing_is_fetched(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    seen = Seen(text)
    assert not seen.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"} and "details" in seen.tags
    assert seen.outside == [] and "outside.example" not in text and "kept" in seen.sections["notebooks"]
    assert "default-src 'none'" in text
    spoiled = Seen(text.replace("</article>", "<img src='http://outside.example/'><a href='https://x.example'>x</a></article>"))
    assert len(spoiled.outside) == 2 * text.count("</article>"), "the check sees what it looks for"


def test_mlflow_keeps_the_page_and_the_first_release_has_nothing_to_compare_with(state: Path, releases: dict[str, str], page: Path) -> None:
    from textrelay.evidence import Release, evidence, write_page
    from textrelay.exchange import store

    kept = Release.find(releases["2"]).steps["wrap"].artifact("evidence/release.html")
    assert kept and kept.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    first = evidence(releases["1"])
    assert first["before"] is None and first["changes"] is None and first["rival"] is None
    assert write_page(releases["1"], state / "first.html") and "the first release" in (state / "first.html").read_text()
    assert store().get_run(Release.find(releases["1"]).steps["wrap"].run_id)


def test_a_champion_that_was_deleted_and_a_run_by_hand_are_no_error(state: Path, releases: dict[str, str]) -> None:
    from textrelay.cache import FOUND
    from textrelay.evidence import Release, evidence, page
    from textrelay.exchange import store

    gone, client = "sha256:" + "0" * 64, store()
    for number, before in (("1", None), ("2", releases["1"])):
        wrap = Release.find(releases[number]).steps["wrap"]
        client.set_tag(wrap.run_id, FOUND, f'{{"champion": "{gone}"}}')
        for tag in ("notebook", "key_of"):
            client.delete_tag(wrap.run_id, f"textrelay.{tag}")
        facts = evidence(releases[number])
        seen = Seen(page(facts)).sections
        for tag in ("notebook", "key_of"):
            client.set_tag(wrap.run_id, f"textrelay.{tag}", wrap.tags[f"textrelay.{tag}"])
        client.set_tag(wrap.run_id, FOUND, wrap.tags[FOUND])
        assert (facts["before"] and facts["before"].digest) == before and f"it was judged against {gone}, whose versions were deleted" in seen["summary"]
        assert "by hand" in seen["lineage"] and "the first release" not in seen["summary"] + seen["changes"]


def test_a_data_set_that_was_deleted_is_no_error(state: Path, releases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from textrelay import evidence

    real, gone = evidence.consume, evidence.Release.find(releases["1"]).steps["train"].result["dataset"]
    monkeypatch.setattr(evidence, "consume", lambda reference: real("replies@999" if reference == gone else reference))  # there is no such version either
    first, second = (Seen(evidence.page(evidence.evidence(releases[number]))).sections for number in ("1", "2"))
    assert "The data set was deleted" in first["lineage"] and gone in first["lineage"] and "Rows of the data set" in second["lineage"]
    assert "one of them was deleted" in second["changes"] and "different rows were added" not in second["changes"]


def test_a_release_that_is_not_there(state: Path, releases: dict[str, str]) -> None:
    from textrelay.evidence import Release

    with pytest.raises(ValueError, match="no version with release"):
        Release.find("sha256:" + "0" * 64)


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    "An HTTP proxy, and what it was asked for."
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

        do_CONNECT = do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", seen
    server.shutdown()


@pytest.fixture
def look(tmp_path: Path, asked: tuple[str, list[str]]) -> Callable[..., str]:
    if not (browser := shutil.which("chromium")):
        pytest.skip("no chromium on PATH; the test opens the release page in a real browser (Debian: chromium)")
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
    flags = [*quiet.split(), "--window-size=1100,6000", f"--user-data-dir={tmp_path / 'profile'}", f"--proxy-server={asked[0]}", "--proxy-bypass-list=<-loopback>"]
    return lambda path, *more: subprocess.run([browser, *flags, *more, path.as_uri()], capture_output=True, text=True, timeout=120).stdout


def test_in_a_browser(page: Path, look: Callable[..., str], asked: tuple[str, list[str]], tmp_path: Path) -> None:
    from PIL import Image

    control = tmp_path / "control.html"
    control.write_text("<p>x</p><img src='http://outside.example/x.png'>")
    look(control, "--dump-dom")
    assert any("outside.example" in path for path in asked[1]), "the proxy sees what a page asks for"
    asked[1].clear()
    opened = tmp_path / "opened.html"
    opened.write_text(page.read_text(encoding="utf-8").replace("<details>", "<details open>"), encoding="utf-8")
    dom = look(opened, "--dump-dom")
    assert "<title>reply-intent" in dom and "The deploy report" in dom
    look(opened, f"--screenshot={tmp_path / 'seen.png'}")
    assert [path for path in asked[1] if "google" not in path and "gvt1" not in path] == [], "the page asks for nothing; what is left out are the browser's own errands"
    colours = Image.open(tmp_path / "seen.png").convert("RGB").getcolors(2**24)
    assert colours and len(colours) > 100 and max(n for n, _ in colours) < 0.99 * sum(n for n, _ in colours), "an empty page"
    assert (ROOT / "nbs/lib/58_evidence.ipynb").is_file()
