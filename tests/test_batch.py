"""`textrelay score` on whole files: killed and started again, no row is lost or doubled; memory does not grow with the file."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from textrelay.core import read_table, scan_table, write_table

WORDS = {"positive": "yes call next week meeting", "objection": "no budget this year sorry", "unsubscribe": "stop remove me from list"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A tiny model with filters, as it is shipped."
    from textrelay.classifier import TransformerClassifier, tiny_model
    from textrelay.filters import Automatic, Stamp
    from textrelay.model import Model

    folder = tmp_path_factory.mktemp("batch")
    clf = TransformerClassifier(tiny_model(folder / "tiny"), epochs=10, learning_rate=2e-3, threads=1, quiet=True)
    clf.fit([words for words in WORDS.values() for _ in range(8)], [label for label in WORDS for _ in range(8)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on tracing
        return Model(clf, before=[Automatic()], after=[Stamp()], name="demo").save(folder / "model")


def messages(n: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for k in range(n):
        label = draw.choice(list(WORDS))
        yield {"id": f"m{k}", "text": " ".join(draw.sample(WORDS[label].split(), 3)) + f"\n{k}, \"quoted\"", "intent": label}


def scoring(model: Path, source: Path, target: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "textrelay.cli", "score", str(source), str(target), "--model", str(model), "--label", "intent", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def noted(target: Path) -> int:
    "Rows that are safe on disk."
    note = target.with_name(f"{target.name}.part.json")
    return int(json.loads(note.read_text())["rows"]) if note.is_file() else 0


def kill_after(process: subprocess.Popen[str], target: Path, rows: int) -> int:
    "SIGKILL once so many rows are noted; how many there were."
    deadline = time.monotonic() + 1800
    while noted(target) < rows:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[1]
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)
    return noted(target)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_killed_and_started_again_every_row_is_there_once(model: Path, tmp_path: Path, ending: str) -> None:
    rows, whole, target = list(messages(8000)), tmp_path / "whole.jsonl", tmp_path / f"scores.{ending}"
    source = write_table(tmp_path / "mail.csv", rows)
    done = kill_after(scoring(model, source, target), target, 1000)
    assert 0 < done < len(rows) and not target.exists()
    again = scoring(model, source, target)
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0 and f"{done} rows were scored before; going on" in said, said
    assert scoring(model, source, whole).wait(120) == 0
    scored, undisturbed = read_table(target), read_table(whole)
    assert [r["id"] for r in scored] == [r["id"] for r in rows] and [r["label"] for r in scored] == [r["intent"] for r in rows]
    assert [(r["predicted"], r["status"]) for r in scored] == [(r["predicted"], r["status"]) for r in undisturbed]
    assert [float(r["p.positive"]) for r in scored] == pytest.approx([r["p.positive"] for r in undisturbed], abs=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["mail.csv", target.name, "whole.jsonl"])


@pytest.mark.skipif(not shutil.which("java"), reason="no java on PATH; Spark needs one (Debian: default-jre-headless)")
def test_spark_gives_the_same_answers(model: Path, tmp_path: Path) -> None:
    rows = [*messages(500), {"id": "away", "text": "Automatic reply: I am out of office until Monday.", "intent": "positive"}]
    source, spark, local = write_table(tmp_path / "mail.csv", rows), tmp_path / "spark.parquet", tmp_path / "local.parquet"
    process = scoring(model, source, spark, "--engine", "spark")
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0 and "501 rows, " in said, said
    assert scoring(model, source, local).wait(120) == 0
    ours = {r["id"]: r for part in sorted(spark.glob("part-*")) for r in read_table(part)}
    theirs = {r["id"]: r for r in read_table(local)}
    assert len(ours) == 501 and ours.keys() == theirs.keys() and list(ours["m0"]) == list(theirs["m0"])
    for name, row in ours.items():
        assert {k: v for k, v in row.items() if k != "ms" and not k.startswith("p.")} == {k: v for k, v in theirs[name].items() if k != "ms" and not k.startswith("p.")}
        assert all(row[k] == theirs[name][k] or abs(row[k] - theirs[name][k]) < 1e-5 for k in row if k.startswith("p."))
    again = scoring(model, source, spark, "--engine", "spark")
    assert "exists; Spark writes a new folder" in again.communicate(timeout=60)[1] and again.returncode == 1


@pytest.mark.skipif(not shutil.which("java"), reason="no java on PATH; Spark needs one (Debian: default-jre-headless)")
def test_spark_takes_a_row_as_a_file_does(model: Path, tmp_path: Path) -> None:
    "Headers of some rows alone, which Spark makes columns of all; a label that is unknown."
    rows = [{"id": "1", "text": "yes call", "headers": {}, "intent": "positive"},
            {"id": "0", "text": "I am away.", "headers": {"Auto-Submitted": "auto-replied"}, "intent": None},
            {"id": "2", "text": "no budget", "headers": {"Precedence": "list"}, "intent": "objection"}]
    source, spark, local = write_table(tmp_path / "mail.jsonl", rows), tmp_path / "spark.jsonl", tmp_path / "local.jsonl"
    process = scoring(model, source, spark, "--engine", "spark")
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 0 and "3 rows, 1 held back" in said, said
    assert scoring(model, source, local).wait(120) == 0
    ours = [json.loads(line) for part in sorted(spark.glob("part-*")) for line in part.read_text().splitlines()]
    told = ("id", "label", "predicted", "status", "reason")
    assert [[r[k] for k in told] for r in ours] == [[r[k] for k in told] for r in read_table(local)]
    assert [(r["label"], r["reason"]) for r in ours] == [("positive", ""), ("", "automatic:out_of_office"), ("objection", "")]


@pytest.mark.soak
def test_a_million_rows_in_flat_memory_killed_half_way(model: Path, tmp_path: Path) -> None:
    source, target, n = tmp_path / "mail.jsonl", tmp_path / "scores.csv", 1_000_000
    with open(source, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in messages(n))
    started = time.monotonic()
    done = kill_after(scoring(model, source, target), target, n // 2)
    again, memory = scoring(model, source, target), []
    while again.poll() is None:
        if noted(target) > done:
            memory.append(psutil.Process(again.pid).memory_info().rss / 1e6)
        time.sleep(1)
    assert again.returncode == 0, again.communicate(timeout=5)[1]
    first, last = (max(part) for part in (memory[: len(memory) // 4], memory[-(len(memory) // 4) :]))
    print(f"{n} rows in {time.monotonic() - started:.0f} s; memory {first:.0f} MB in the first quarter after the kill, {last:.0f} MB in the last")
    assert last < first + 20
    seen = Counter(row["id"] for row, _ in scan_table(target))
    assert len(seen) == n and set(seen.values()) == {1}
