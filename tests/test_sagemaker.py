"SageMaker as a target: two regions, rehearsed. The endpoints are asked by boto3 itself, not by our code."

import json
import logging
import random
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import nbformat
import papermill
import pytest

from test_releases import PRODUCTION, Checkout, checkout  # noqa: F401
from textrelay.aws import READS, Call, actions, role_policy
from textrelay.capture import read_capture
from textrelay.classifier import TransformerClassifier, tiny_model
from textrelay.core import digest_json, read_json, read_table, read_yaml
from textrelay.filters import CurrentReply, Stamp
from textrelay.hosting import Settings
from textrelay.model import Model
from textrelay.rehearsal import Server
from textrelay.sagemaker import SageMakerTarget
from textrelay.sealing import seal
from textrelay.stages import run_chain
from textrelay.variants import compare_variants

ROOT = Path(__file__).parents[1]
REGIONS = ("eu-central-1", "us-east-1")
TEXTS = ["yes we meet next week", "no budget", "stop remove", "yes call", "we use this no thanks", "remove this stop"] * 8
MANIFEST = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": {}, "layers": []}
LABELS = ["positive", "objection", "unsubscribe"] * 16
SPEED = 240.0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    "Two releases with the same answers."
    folder = tmp_path_factory.mktemp("bundles")
    for version, name in enumerate(("one", "two"), 1):
        sealed(folder, name, str(version), LABELS)
    return {name: folder / name for name in ("one", "two")}


def sealed(folder: Path, name: str, version: str, labels: list[str], texts: list[str] = TEXTS, epochs: int = 12) -> Path:
    "A bundle of a tiny model; equal labels make equal models."
    if not (saved := folder / digest_json(labels)[7:15]).exists():
        how: dict[str, Any] = {"epochs": epochs, "precision": "float32", "learning_rate": 2e-3, "batch_size": 8, "threads": 1, "quiet": True}
        clf = TransformerClassifier(tiny_model(folder / f"tiny-{name}", " ".join(sorted(set(re.findall(r"\w+", " ".join(texts)))))), **how).fit(texts, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Model(clf, before=[CurrentReply()], after=[Stamp()], name="reply-intent").save(saved)
    seal(saved, folder / name, golden=texts[:6], facts={"name": "reply-intent", "version": version, "commit": "c" * 40}, provenance={"name": name})
    return folder / name


@pytest.fixture(scope="module")
def aws() -> Iterator[Server]:
    "The rehearsal, with a bucket and an image in each region; this process uses it instead of AWS."
    with Server(speed=SPEED) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        for region in REGIONS:
            where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
            boto3.client("s3", region_name=region).create_bucket(Bucket=f"acme-{region}", **where)
            ecr = boto3.client("ecr", region_name=region)
            ecr.create_repository(repositoryName="reply-intent")
            ecr.put_image(repositoryName="reply-intent", imageTag="1", imageManifest=json.dumps(MANIFEST))
        yield server
        server.app.faults.put([])


@pytest.fixture
def settings(aws) -> Settings:
    aws.app.faults.put([])
    return Settings.of({
        "regions": list(REGIONS), "bucket": "acme-{region}", "role": aws.role, "image": "{account}.dkr.ecr.{region}.amazonaws.com/reply-intent:1",
        "instance_type": "ml.c7i.large", "instance_count": 2, "wait_s": 480, "bake_s": 120, "period_s": 1200, "capture": 1.0, "poll_s": 0.2, "patience_s": 5,
        "timeout_s": 3000, "latency_ms": 30_000})  # a machine that does other things as well is slow now and then


def release(bundle: Path) -> str:
    found: str = read_json(bundle / "release.json")["release"]
    return found


def ask(region: str, name: str, text: str) -> dict[str, Any]:
    "By boto3 alone."
    said = boto3.client("sagemaker-runtime", region_name=region).invoke_endpoint(EndpointName=name, ContentType="application/json", Body=json.dumps([text]))
    answer: dict[str, Any] = json.loads(said["Body"].read())
    return answer


def running(name: str) -> list[str]:
    return [ask(region, name, "yes call")["model"]["release"] for region in REGIONS]


def rights(calls: list[Call]) -> set[tuple[str, str]]:
    "Action and resource, as the printed policy has them."
    return {(action, on) for s in role_policy(calls, "123456789012")["Statement"] for action in s["Action"] for on in s["Resource"]}


class Heard(logging.Handler):
    "Every call that botocore makes in this process, by its own log: no code of ours."

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Making request for"):
            model, request = record.args  # type: ignore[misc]
            self.calls.append((model.service_model.service_name, model.name))  # type: ignore[union-attr]

    def __enter__(self) -> "Heard":
        self.log = logging.getLogger("botocore.endpoint")
        self.log.setLevel(logging.DEBUG)
        self.log.addHandler(self)
        return self

    def __exit__(self, *ignored: object) -> None:
        self.log.removeHandler(self)
        self.log.setLevel(logging.NOTSET)


def test_two_regions(aws, settings, bundles):
    "Deployed, asked by boto3, promoted, rolled back to the very digest; every call was in the dry run's list and the role's document."
    target, name = SageMakerTarget(settings), "reply-intent"
    one, two = release(bundles["one"]), release(bundles["two"])
    known = [*target.plan(bundles["one"], name, facts={"version": "1"}), *target.later(name)]  # what the policy is made of that was printed for the new endpoint
    expected = [row["expected"] for row in read_table(bundles["one"] / "golden.jsonl")]
    for bundle, facts in ((bundles["one"], {"version": "1"}), (bundles["two"], {"version": "2", "approvals": "a b"})):
        plan = target.plan(bundle, name, facts=facts)
        with Heard() as heard:
            done = target.deploy(bundle, name, facts=facts)
        made, planned = set(heard.calls), {(c.service, c.operation) for c in plan if not c.if_it_fails}
        assert made == planned, (made - planned, planned - made)
        changes = [c for c in heard.calls if not c[1].startswith(READS) and c[1] != "InvokeEndpoint"]
        assert changes == [(c.service, c.operation) for c in plan if c.changes and not c.if_it_fails and c.operation != "InvokeEndpoint"]
        allowed = {a for s in role_policy([*plan, *target.later(name)], settings.account)["Statement"] for a in s["Action"]}
        assert {a for c in plan for a in actions(c)} < allowed == {a for c in [*plan, *target.later(name)] for a in actions(c)}
        assert {"sagemaker:ListModels", "sagemaker:DeleteModel", "sagemaker:DeleteEndpointConfig", "sagemaker:UpdateEndpointWeightsAndCapacities"} <= allowed
        assert done.release == release(bundle) and set(done.regions) == set(REGIONS) and done.status == "running" and not done.drift
        for region in REGIONS:
            for text, wanted in zip(TEXTS[:6], expected, strict=True):
                assert ask(region, name, text)["predictions"][0]["label"] == wanted["label"]
    assert running(name) == [two, two] and done.facts["version"] == "2" and done.facts["approvals"] == "a b"
    assert target.deploy(bundles["two"], name, facts={"version": "2", "approvals": "a b"}).release == two  # nothing to do
    assert target.status(name)["previous"]["release"] == one and [e.name for e in target.endpoints()] == [name]
    back = target.rollback(name)
    assert back.release == one and running(name) == [one, one] and back.drift == [] == target.status(name)["drift"]
    scaled = SageMakerTarget(replace(settings, autoscaling={"min": 2, "max": 4, "per_instance": 100})).plan(bundles["one"], "scaled")
    assert [c.region for c in scaled if c.operation == "PutScalingPolicy"] == list(REGIONS)
    assert not (more := rights([c for c in target.aws.calls if c.operation != "ListEndpoints"]) - rights(known)), more


@pytest.mark.soak
def test_bad_candidate(aws, settings, bundles):
    "It fails in the second region under the canary: its alarm rolls it back, the first region follows, and no more than the canary's share was touched."
    target, name = SageMakerTarget(settings), "reply-intent"
    target.deploy(bundles["one"], name, facts={"version": "1"})
    before = running(name)
    aws.app.faults.put([{"kind": "model_error", "region": "us-east-1", "model": model_of(target, bundles["two"], name, "us-east-1")}])
    with Users("us-east-1", name) as users, pytest.raises(RuntimeError) as refused:
        target.deploy(bundles["two"], name)
    said = str(refused.value)
    assert "us-east-1: reply-intent went back to" in said and "ALARM" in said and f"all regions run what they ran before ({before[0][:19]})" in said
    assert running(name) == before and not target.status(name)["drift"]
    assert users.failed and users.failed <= 0.1 * users.asked + 1, (users.failed, users.asked)


def model_of(target: SageMakerTarget, bundle: Path, name: str, region: str) -> str:
    "Name of the model that a deployment would make, or find."
    described = [c.params["ModelName"] for c in target.plan(bundle, name) if c.operation == "DescribeModel" and c.region == region]
    return next(m for m in described if release(bundle)[7:19] in m)


class Users:
    "People who ask an endpoint, one after the other, by boto3."

    def __init__(self, region: str, name: str) -> None:
        self.region, self.name, self.asked, self.failed = region, name, 0, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._done.wait(0.005):
            self.asked += 1
            try:
                ask(self.region, self.name, "yes call")
            except Exception:
                self.failed += 1

    def __enter__(self) -> "Users":
        self._thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._done.set()
        self._thread.join()


@pytest.mark.soak
def test_shadow_and_candidate(aws, settings, bundles, state, tmp_path):
    "A planted regression is seen by a shadow run; a candidate gets its share, then all, and is rolled back."
    target, name, wrong = SageMakerTarget(settings), "variants", sealed(tmp_path, "wrong", "3", [*LABELS[1:], LABELS[0]])
    known = [*target.plan(bundles["one"], name), *target.later(name)]  # what the printed policy is made of
    target.deploy(bundles["one"], name)
    watched = target.deploy(wrong, name, shadow=True)
    assert watched.shadow["facts"]["release"] == release(wrong) and watched.release == release(bundles["one"]) and not target.status(name)["drift"]
    for n, text in enumerate(TEXTS[:6] * 10):
        ask(REGIONS[n % 2], name, text)
    time.sleep(2)
    found = compare_variants(read_capture(SageMakerTarget(settings).captured(name)), latency_ms=SageMakerTarget(settings).latency(name))
    assert found.pairs >= 60 and found.flips.low > 0.5 and set(found.latency_ms) == {"current", "shadow"}, str(found)
    tried = target.deploy(bundles["two"], name, share=0.2)
    assert tried.shadow is None and tried.candidate == {"share": 0.2, "facts": {"release": release(bundles["two"])}} and tried.release == release(bundles["one"])
    assert target.shift(name, 0.6).candidate["share"] == 0.6 and not target.status(name)["drift"]
    weights = boto3.client("sagemaker", region_name=REGIONS[1]).describe_endpoint(EndpointName=name)["ProductionVariants"]
    assert {v["VariantName"]: round(v["CurrentWeight"], 3) for v in weights} == {"current": 0.4, "candidate": 0.6}
    boto3.client("sagemaker", region_name=REGIONS[1]).update_endpoint_weights_and_capacities(
        EndpointName=name, DesiredWeightsAndCapacities=[{"VariantName": "candidate", "DesiredWeight": 0.1}])
    boto3.client("sagemaker", region_name=REGIONS[1]).get_waiter("endpoint_in_service").wait(EndpointName=name, WaiterConfig={"Delay": 1})
    assert any("us-east-1: variant 'candidate' has weight 0.1" in d for d in target.status(name)["drift"])
    hand, good = boto3.client("sagemaker", region_name=REGIONS[1]), target.status(name)["regions"][REGIONS[1]]["good"]
    plain = next(c["EndpointConfigName"] for c in hand.list_endpoint_configs(NameContains=name)["EndpointConfigs"] if c["EndpointConfigName"] != good)
    hand.update_endpoint(EndpointName=name, EndpointConfigName=plain)
    hand.get_waiter("endpoint_in_service").wait(EndpointName=name, WaiterConfig={"Delay": 1})
    again = target.rollback(name)
    assert again.candidate == {"share": 0.6, "facts": {"release": release(bundles["two"])}} and not target.status(name)["drift"], target.status(name)
    won = target.shift(name, 1)
    assert won.release == release(bundles["two"]) and won.candidate is None and running(name) == [won.release] * 2
    assert target.rollback(name).release == release(bundles["one"]) and running(name) == [release(bundles["one"])] * 2
    target.delete(name)
    assert not (more := rights(target.aws.calls) - rights(known)), more
    assert name not in [e.name for e in target.endpoints()]
    assert not boto3.client("sagemaker", region_name=REGIONS[0]).list_models(NameContains=name)["Models"]


FAULTS: dict[str, dict[str, Any]] = {
    "the role cannot be asked for": {"kind": "down", "service": "iam", "region": ""},
    "the bucket cannot be read": {"kind": "down", "service": "s3", "region": "us-east-1", "skip": 1},
    "no right to make a model": {"kind": "error", "operation": "CreateModel", "code": "AccessDeniedException", "region": "us-east-1"},
    "no right to make a configuration": {"kind": "error", "operation": "CreateEndpointConfig", "code": "AccessDeniedException", "region": "us-east-1"},
    "no right to update the first": {"kind": "error", "operation": "UpdateEndpoint", "code": "AccessDeniedException", "region": "eu-central-1"},
    "no right to update the second": {"kind": "error", "operation": "UpdateEndpoint", "code": "AccessDeniedException", "region": "us-east-1"},
    "no instances": {"kind": "no_capacity", "region": "us-east-1"},
    "the container is not healthy": {"kind": "unhealthy", "region": "us-east-1"},
    "the container starts too slowly": {"kind": "slow_start", "region": "us-east-1", "seconds": 900},
    "the model fails": {"kind": "model_error", "region": "us-east-1"},
    "the region is down for a while": {"kind": "down", "region": "us-east-1", "service": "sagemaker", "skip": 40, "times": 20},
    "the region is down for good": {"kind": "down", "region": "us-east-1", "service": "", "skip": 30, "times": 200},
    "throttled twice": {"kind": "error", "operation": "DescribeEndpoint", "region": "us-east-1", "skip": 3, "times": 2},
    "it cannot be written down": {"kind": "error", "operation": "AddTags", "code": "AccessDeniedException", "region": "us-east-1"},
}


@pytest.mark.soak
def test_shadow_over_enron(aws, settings, enron, state, tmp_path):
    "Real sentences, recorded in S3: a shadow that learned a third of the labels wrongly is told from one that is the same model."
    target, name, rows = SageMakerTarget(settings), "enron", read_table(enron)
    random.Random(0).shuffle(rows)  # they are sorted by their label
    learned, asked = [r["text"] for r in rows[:900]], [r["text"] for r in rows[900:1200]]
    labels = [r["intent"] for r in rows[:900]]
    other = dict(zip(sorted(set(labels)), sorted(set(labels), reverse=True), strict=True))
    planted = [other[label] if n % 3 == 0 else label for n, label in enumerate(labels)]
    target.deploy(sealed(tmp_path, "now", "1", labels, learned, 4), name)
    found = {}
    for version, (what, said) in enumerate({"same": labels, "planted": planted}.items(), 2):
        target.deploy(sealed(tmp_path, what, str(version), said, learned, 4), name, shadow=True)
        since = datetime.now(UTC).isoformat()
        for n, text in enumerate(asked):
            ask(REGIONS[n % 2], name, text)
        time.sleep(3)
        rows = [r for r in read_capture(target.captured(name)) if r["time"] >= since[:19]]
        found[what] = compare_variants(rows, latency_ms=target.latency(name))
        print(what, found[what])
    assert found["same"].pairs >= 290 and found["same"].flips.value == 0
    assert found["planted"].pairs >= 290 and found["planted"].flips.low > found["same"].flips.high and set(found["planted"].latency_ms) == {"current", "shadow"}


@pytest.mark.soak
def test_chain(aws, state):
    "A params file with a target in two regions: the chain ends in endpoints that boto3 gets right answers from, and what they were asked is in S3."
    target = read_yaml(ROOT / "params/rehearsal.yaml")["deploy"]["target"]["sagemaker"]
    target = {**target, "bucket": "acme-{region}", "role": aws.role, "wait_s": 480, "period_s": 1200, "poll_s": 0.2, "latency_ms": 30_000}
    deploy = {"endpoint": "chain", "target": {"sagemaker": target}, "requests": 5}
    chain = run_chain(ROOT / "params/ci.yaml", overrides={"deploy": deploy})
    digest = chain.results["deploy"]["release"]
    for region in REGIONS:
        answer = ask(region, "chain", "Please take me off your list.")
        assert answer["model"]["release"] == digest and answer["predictions"][0]["status"] in ("scored", "abstained")
    deadline = time.monotonic() + 20
    while not all(boto3.client("s3", region_name=r).list_objects_v2(Bucket=f"acme-{r}", Prefix="capture/chain/").get("KeyCount") for r in REGIONS):
        assert time.monotonic() < deadline, "nothing was captured"
        time.sleep(0.5)


@pytest.mark.soak
def test_from_a_build_to_production_in_two_regions_and_back(aws, checkout: Checkout):  # noqa: F811
    "By commands alone, with the people who sign between them: staging, production, a candidate that fails under the canary, a better one, rollback."
    def in_production() -> tuple[str, list[str]]:
        row, = json.loads(checkout.textrelay("status", "replies@production", "--json"))
        assert not row["problems"], row
        return row["release"], running("replies-production")

    def signed(release: str) -> tuple[str, str, str]:
        checkout.approve("bob", "promote", release)
        return "promote", release, "params/production.yaml"

    place = {"regions": list(REGIONS), "bucket": "acme-{region}", "role": aws.role, "image": "{account}.dkr.ecr.{region}.amazonaws.com/reply-intent:1",
             "instance_type": "ml.c7i.large", "instance_count": 2, "wait_s": 480, "bake_s": 120, "period_s": 1200, "capture": 1.0, "poll_s": 0.2, "latency_ms": 30_000}
    (checkout.folder / "params/production.yaml").write_text(PRODUCTION.replace("deploy: {", f"deploy: {{target: {{sagemaker: {json.dumps(place)}}}, "))
    aws.app.faults.put([])
    first = checkout.build(lambda text: text + "# the first\n", "first")
    assert running("replies-staging") == [first, first] and "no approval to promote" in checkout.textrelay("promote", first, "params/production.yaml", code=3)
    checkout.textrelay(*signed(first))
    assert in_production() == (first, [first, first])

    second = checkout.build(lambda text: text.replace("epochs: 6", "epochs: 8"), "second")
    promote = signed(second)
    planned = [c for c in json.loads(checkout.textrelay(*promote, "--dry-run", "--json"))["calls"] if not c["if_it_fails"]]
    model, = {c["params"]["ModelName"] for c in planned if c["operation"] == "CreateModel" and c["region"] == REGIONS[1]}
    aws.app.faults.put([{"kind": "model_error", "region": REGIONS[1], "model": model}])
    with Users(REGIONS[1], "replies-production") as users:
        said = checkout.textrelay(*promote, code=1)
    aws.app.faults.put([])
    print(f"under the canary {users.failed} of {users.asked} failed; {said.strip().splitlines()[-1]}")
    assert "ALARM" in said and f"all regions run what they ran before ({first[:19]})" in said and 0 < users.failed <= 0.1 * users.asked + 1
    assert in_production() == (first, [first, first])

    planned = [c for c in json.loads(checkout.textrelay(*promote, "--dry-run", "--json"))["calls"] if not c["if_it_fails"]]
    aws.app.calls.clear()
    checkout.textrelay(*promote)
    assert {(c["region"], c["operation"]) for c in aws.app.calls} == {(c["region"], c["operation"]) for c in planned}
    assert in_production() == (second, [second, second])
    assert first in checkout.textrelay("rollback", "replies-production", "--dry-run") and in_production() == (second, [second, second])
    checkout.textrelay("rollback", "replies@production")
    assert in_production() == (first, [first, first])
    print(checkout.textrelay("log"))
    assert read_capture(SageMakerTarget(Settings.of(place)).captured("replies-production"))
    for region in REGIONS:
        assert boto3.client("s3", region_name=region).list_objects_v2(Bucket=f"acme-{region}", Prefix="capture/replies-production/")["KeyCount"]


@pytest.mark.soak
def test_notebook(state, tmp_path, monkeypatch):
    "nbs/explore/rehearsal.ipynb from top to bottom."
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    out, notebook = tmp_path / "out.ipynb", ROOT / "nbs/explore/rehearsal.ipynb"
    papermill.execute_notebook(str(notebook), str(out), cwd=str(notebook.parent), kernel_name="python3", progress_bar=False)
    cells = nbformat.read(out, as_version=4).cells
    text = "".join(o.text for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream" and o.name == "stdout")
    assert "all regions run what they ran before" in text and "{'eu-central-1': True, 'us-east-1': True}" in text
    assert "deployed    True" in text and "rolled back True" in text and "drift       []" in text and "messages, such as" in text


@pytest.mark.soak
@pytest.mark.parametrize("what", FAULTS)
def test_faults(aws, settings, bundles, monkeypatch, what):
    "Whatever goes wrong wherever: all regions run the new release, or all the old one, and the message says which and why."
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")
    target, name = SageMakerTarget(replace(settings, patience_s=120)), "faults"
    target.deploy(bundles["one"], name)
    new = sealed(bundles["one"].parent, f"fault-{list(FAULTS).index(what)}", "9", LABELS)  # a release that no region has anything of
    one, two, fault = release(bundles["one"]), release(new), FAULTS[what]
    model = {"model": model_of(target, new, name, fault["region"])} if fault["kind"] in ("no_capacity", "unhealthy", "slow_start", "model_error") else {}
    aws.app.faults.put([{**fault, **model}])
    said = ""
    try:
        SageMakerTarget(replace(settings, patience_s=120)).deploy(new, name)
    except (RuntimeError, ValueError) as e:
        said = str(e)
    met = aws.app.faults.told()[0]["met"]
    aws.app.faults.put([])
    for region in REGIONS:
        boto3.client("sagemaker", region_name=region).get_waiter("endpoint_in_service").wait(EndpointName=name, WaiterConfig={"Delay": 1})
    now = running(name)
    print(f"{what}: met {met} times; {'all new' if now == [two, two] else 'all old' if now == [one, one] else 'MIXED'}; {said or 'no error'}")
    assert met and now in ([one, one], [two, two])
    if now == [one, one]:
        assert "no endpoint was changed" in said or "nothing was changed" in said or f"all regions run what they ran before ({one[:19]})" in said
        assert (fault["region"] or "eu-central-1") in said
    elif said:
        assert "it serves in all regions, but that could not be written down" in said
    assert target.deploy(new, name).release == two and running(name) == [two, two] and not target.status(name)["drift"]
    assert target.rollback(name).release == one and running(name) == [one, one] and not target.status(name)["drift"]
