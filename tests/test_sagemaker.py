"SageMaker as a target: two regions, rehearsed. The endpoints are asked by boto3 itself, not by our code."

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from textrelay.aws import READS, actions, role_policy
from textrelay.classifier import TransformerClassifier, tiny_model
from textrelay.core import read_json, read_table
from textrelay.filters import CurrentReply, Stamp
from textrelay.hosting import Settings
from textrelay.model import Model
from textrelay.rehearsal import Server
from textrelay.sagemaker import SageMakerTarget
from textrelay.sealing import seal

REGIONS = ("eu-central-1", "us-east-1")
TEXTS = ["yes we meet next week", "no budget", "stop remove", "yes call", "we use this no thanks", "remove this stop"] * 8
MANIFEST = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": {}, "layers": []}
SPEED = 600.0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Path]:
    "Three releases: 'one', 'two' with the same answers, and 'wrong', which learned the labels in another order."
    folder = tmp_path_factory.mktemp("bundles")
    labels = ["positive", "objection", "unsubscribe"] * 16
    how: dict[str, Any] = {"epochs": 30, "precision": "float32", "learning_rate": 2e-3, "batch_size": 8, "threads": 1, "quiet": True}
    for name, said in (("model", labels), ("other", [*labels[1:], labels[0]])):
        clf = TransformerClassifier(tiny_model(folder / f"tiny-{name}"), **how).fit(TEXTS, said)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Model(clf, before=[CurrentReply()], after=[Stamp()], name="reply-intent").save(folder / name)
    for version, (name, model) in enumerate({"one": "model", "two": "model", "wrong": "other"}.items(), 1):
        seal(folder / model, folder / name, golden=TEXTS[:6], facts={"name": "reply-intent", "version": str(version), "commit": "c" * 40}, provenance={"n": name})
    return {name: folder / name for name in ("one", "two", "wrong")}


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
        "instance_type": "ml.c7i.large", "instance_count": 2, "wait_s": 240, "bake_s": 120, "capture": 1.0, "poll_s": 0.2, "patience_s": 5, "timeout_s": 3000})


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
    expected = [row["expected"] for row in read_table(bundles["one"] / "golden.jsonl")]
    for bundle, facts in ((bundles["one"], {"version": "1"}), (bundles["two"], {"version": "2", "approvals": "a b"})):
        plan = target.plan(bundle, name, facts=facts)
        with Heard() as heard:
            done = target.deploy(bundle, name, facts=facts)
        made, planned = set(heard.calls), {(c.service, c.operation) for c in plan if not c.if_it_fails}
        assert made == planned, (made - planned, planned - made)
        changes = [c for c in heard.calls if not c[1].startswith(READS) and c[1] != "InvokeEndpoint"]
        assert changes == [(c.service, c.operation) for c in plan if c.changes and not c.if_it_fails and c.operation != "InvokeEndpoint"]
        allowed = {a for s in role_policy(plan, settings.account)["Statement"] for a in s["Action"]}
        assert allowed == {a for c in plan for a in actions(c)}
        assert done.release == release(bundle) and set(done.regions) == set(REGIONS) and done.status == "running" and not done.drift
        for region in REGIONS:
            for text, wanted in zip(TEXTS[:6], expected, strict=True):
                assert ask(region, name, text)["predictions"][0]["label"] == wanted["label"]
    assert running(name) == [two, two] and done.facts["version"] == "2" and done.facts["approvals"] == "a b"
    assert target.deploy(bundles["two"], name, facts={"version": "2", "approvals": "a b"}).release == two  # nothing to do
    back = target.rollback(name)
    assert back.release == one and running(name) == [one, one] and target.rollback(name).release == two
    assert target.status(name)["previous"]["release"] == one and [e.name for e in target.endpoints()] == [name]
