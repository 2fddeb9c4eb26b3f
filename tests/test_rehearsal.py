"""AWS as it is rehearsed, used as AWS is: by boto3, the SageMaker SDK's resources and MLflow's client, none of which knows.

What one function does is tested under it, in nbs/lib: awsapi, account, alarms, containers, catalog, plane, invocations, rehearsal.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import LABELS, ROOT, TEXTS, running
from textrelay.worker import read_bundle

IRELAND, OHIO = "eu-west-1", "us-east-2"
IMAGE = "123456789012.dkr.ecr.{}.amazonaws.com/reply-intent:v1"
CAPTURE = {"InitialSamplingPercentage": 100, "DestinationS3Uri": "s3://models-eu-west-1/capture", "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
           "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]}}
CANARY = {"BlueGreenUpdatePolicy": {
    "TrafficRoutingConfiguration": {"Type": "CANARY", "WaitIntervalInSeconds": 600, "CanarySize": {"Type": "CAPACITY_PERCENT", "Value": 10}},
    "MaximumExecutionTimeoutInSeconds": 7200}}


class Aws:
    "What a deployer has done before: a bucket, a repository with an image, model data; by boto3 alone."

    def __init__(self, server: Any) -> None:
        self.server, self._clients = server, {}
        for region in (IRELAND, OHIO):
            self.client("s3", region).create_bucket(Bucket=f"models-{region}", CreateBucketConfiguration={"LocationConstraint": region})
            self.client("ecr", region).create_repository(repositoryName="reply-intent")
            manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json", "config": {"digest": "sha256:" + "0" * 64}}
            self.client("ecr", region).put_image(repositoryName="reply-intent", imageTag="v1", imageManifest=json.dumps(manifest))

    def client(self, service: str, region: str = IRELAND) -> Any:
        import boto3

        if (service, region) not in self._clients:
            self._clients[service, region] = boto3.client(service, region_name=region)
        return self._clients[service, region]

    def upload(self, bundle: Path, region: str = IRELAND) -> str:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for path in sorted(bundle.iterdir()):
                tar.add(path, arcname=path.name)
        self.client("s3", region).put_object(Bucket=f"models-{region}", Key=f"{bundle.name}/model.tar.gz", Body=archive.getvalue())
        return f"s3://models-{region}/{bundle.name}/model.tar.gz"

    def model(self, name: str, bundle: Path, region: str = IRELAND, **more: Any) -> str:
        container = {"Image": IMAGE.format(region), "ModelDataUrl": self.upload(bundle, region)}
        self.client("sagemaker", region).create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn=self.server.role, **more)
        return name

    def config(self, name: str, models: dict[str, str], region: str = IRELAND, shadow: str = "", **more: Any) -> str:
        def variant(name: str, model: str, count: int = 1) -> dict[str, Any]:
            return {"VariantName": name, "ModelName": model, "InstanceType": "ml.m5.large", "InitialInstanceCount": count}

        if shadow:
            more["ShadowProductionVariants"] = [variant("shadow", shadow)]
        self.client("sagemaker", region).create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant(v, m) for v, m in models.items()], **more)
        return name

    def create(self, endpoint: str, config: str, region: str = IRELAND) -> dict[str, Any]:
        self.client("sagemaker", region).create_endpoint(EndpointName=endpoint, EndpointConfigName=config)
        return self.settled(endpoint, region)

    def settled(self, endpoint: str, region: str = IRELAND, meanwhile: Callable[[], None] = lambda: time.sleep(0.05)) -> dict[str, Any]:
        while True:
            told = self.client("sagemaker", region).describe_endpoint(EndpointName=endpoint)
            if told["EndpointStatus"] not in ("Creating", "Updating", "RollingBack"):
                return told
            meanwhile()

    def ask(self, endpoint: str, text: str = "yes call", region: str = IRELAND, **more: Any) -> dict[str, Any]:
        body = json.dumps({"text": text})
        told = self.client("sagemaker-runtime", region).invoke_endpoint(EndpointName=endpoint, Body=body, ContentType="application/json", **more)
        return {**json.loads(told["Body"].read()), "variant": told["InvokedProductionVariant"]}

    def alarm(self, endpoint: str, name: str = "errors", **more: Any) -> str:
        asked = {"MetricName": "Invocation5XXErrors", "Statistic": "Average", "Threshold": 0.02, "ComparisonOperator": "GreaterThanThreshold", **more}
        dimensions = [{"Name": "EndpointName", "Value": endpoint}, {"Name": "VariantName", "Value": "main"}]
        self.client("cloudwatch").put_metric_alarm(
            AlarmName=name, Namespace="AWS/SageMaker", Dimensions=dimensions, Period=300, EvaluationPeriods=1, TreatMissingData="notBreaching", **asked)
        return name

    @contextlib.contextmanager
    def faults(self, *faults: dict[str, Any]) -> Iterator[None]:
        def put(value: Any) -> None:
            urllib.request.urlopen(urllib.request.Request(f"{self.server.url}/-/faults", json.dumps(value).encode(), method="PUT")).close()

        put(faults)
        try:
            yield
        finally:
            put([])

    def calls(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(urllib.request.Request(f"{self.server.url}/-/calls", method="DELETE")) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def aws(rehearsal: Any) -> Aws:
    return Aws(rehearsal)


@pytest.fixture(scope="module")
def serving(aws: Aws, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    "An endpoint that several tests look at, update and leave in service; its variant is 'main'."
    aws.model("seven", tiny_bundle)
    assert aws.create("shared", aws.config("seven", {"main": "seven"}))["EndpointStatus"] == "InService"
    return "shared"


def error(call: Callable[[], Any]) -> tuple[str, str]:
    "Code and message of what a call is refused with."
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call()
    return caught.value.response["Error"]["Code"], caught.value.response["Error"]["Message"]


def release(answer: dict[str, Any]) -> str:
    return answer["model"]["version"]


# boto3 --------------------------------------------------------------------------------------------------------------------


def test_boto3_creates_updates_invokes_and_deletes_in_two_regions(aws: Aws, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    eight = another("8")
    for region in (IRELAND, OHIO):
        sagemaker = aws.client("sagemaker", region)
        aws.model("mine-7", tiny_bundle, region, Tags=[{"Key": "release", "Value": "7"}])
        aws.model("mine-8", eight, region)
        for n in ("7", "8"):
            aws.config(f"mine-{n}", {"main": f"mine-{n}"}, region)
        sagemaker.create_endpoint(EndpointName="mine", EndpointConfigName="mine-7", Tags=[{"Key": "stage", "Value": "test"}])
        assert sagemaker.describe_endpoint(EndpointName="mine")["EndpointStatus"] == "Creating"
        assert error(lambda region=region: aws.ask("mine", region=region)) == ("ValidationError", "Endpoint mine of account 123456789012 not found.")
    for region in (IRELAND, OHIO):
        sagemaker = aws.client("sagemaker", region)
        sagemaker.get_waiter("endpoint_in_service").wait(EndpointName="mine", WaiterConfig={"Delay": 1, "MaxAttempts": 60})
        told = sagemaker.describe_endpoint(EndpointName="mine")
        assert told["ProductionVariants"][0]["DeployedImages"][0]["ResolvedImage"].startswith(f"123456789012.dkr.ecr.{region}.amazonaws.com/reply-intent@sha256:")
        assert sagemaker.list_tags(ResourceArn=told["EndpointArn"])["Tags"] == [{"Key": "stage", "Value": "test"}]
        answers = [aws.ask("mine", text, region) for text in TEXTS[:3]]
        assert [a["predictions"][0]["label"] for a in answers] == LABELS
        assert {(a["variant"], a["model"]["version"]) for a in answers} == {("main", "7")}
    with pytest.raises(aws.client("sagemaker-runtime").exceptions.ModelError) as refused:
        aws.client("sagemaker-runtime").invoke_endpoint(EndpointName="mine", Body=b"{", ContentType="application/json")
    assert refused.value.response["OriginalStatusCode"] == 400 and "not valid JSON" in refused.value.response["OriginalMessage"]

    sagemaker = aws.client("sagemaker")
    sagemaker.update_endpoint(EndpointName="mine", EndpointConfigName="mine-8")
    assert error(lambda: sagemaker.update_endpoint(EndpointName="mine", EndpointConfigName="mine-7"))[1].startswith("Cannot update in-progress endpoint")
    assert aws.settled("mine")["EndpointConfigName"] == "mine-8"
    assert release(aws.ask("mine")) == "8" and release(aws.ask("mine", region=OHIO)) == "7"
    for region in (IRELAND, OHIO):
        sagemaker = aws.client("sagemaker", region)
        sagemaker.delete_endpoint(EndpointName="mine")
        sagemaker.get_waiter("endpoint_deleted").wait(EndpointName="mine", WaiterConfig={"Delay": 1, "MaxAttempts": 60})
        for n in ("7", "8"):
            sagemaker.delete_endpoint_config(EndpointConfigName=f"mine-{n}")
            sagemaker.delete_model(ModelName=f"mine-{n}")
        assert [m["ModelName"] for m in sagemaker.list_models(NameContains="mine")["Models"]] == []


def test_what_aws_would_refuse_is_refused(aws: Aws, serving: str, tiny_bundle: Path) -> None:
    sagemaker, url = aws.client("sagemaker"), "s3://models-eu-west-1/none.tar.gz"
    data = aws.upload(tiny_bundle)

    def model(image: str = IMAGE.format(IRELAND), data: str = data, role: str = aws.server.role, client: Any = sagemaker) -> tuple[str, str]:
        return error(lambda: client.create_model(ModelName="bad", PrimaryContainer={"Image": image, "ModelDataUrl": data}, ExecutionRoleArn=role))

    assert model(image=IMAGE.format(IRELAND) + "9") == ("ValidationException", f"Requested image {IMAGE.format(IRELAND)}9 not found.")
    assert "expected an image of this region" in model(image=IMAGE.format(OHIO))[1]
    assert model(data=url) == ("ValidationException", f"Could not find model data at {url}.")
    assert "The bucket is in region eu-west-1" in model(image=IMAGE.format(OHIO), client=aws.client("sagemaker", OHIO))[1]
    assert model(role=aws.server.role + "-no")[1].startswith("Could not assume role")
    assert error(lambda: sagemaker.describe_model(ModelName="none"))[1] == 'Could not find model "arn:aws:sagemaker:eu-west-1:123456789012:model/none".'
    assert "is in use by endpoint shared" in error(lambda: sagemaker.delete_endpoint_config(EndpointConfigName="seven"))[1]
    assert "has the endpoint configuration seven already" in error(lambda: sagemaker.update_endpoint(EndpointName=serving, EndpointConfigName="seven"))[1]
    aws.config("other-name", {"other": "seven"})
    update = {"EndpointName": serving, "EndpointConfigName": "other-name", "DeploymentConfig": CANARY}
    assert "the same variant names" in error(lambda: sagemaker.update_endpoint(**update))[1]
    aws.config("same-name", {"main": "seven"})
    update = {"EndpointName": serving, "EndpointConfigName": "same-name", "DeploymentConfig": {**CANARY, "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": "no"}]}}}
    assert "alarms do not exist in eu-west-1: no" in error(lambda: sagemaker.update_endpoint(**update))[1]
    assert error(lambda: aws.ask(serving, TargetVariant="none"))[0] == "ValidationError"
    assert error(lambda: sagemaker.create_mlflow_tracking_server(TrackingServerName="a", ArtifactStoreUri="s3://a", RoleArn=aws.server.role))[0] in (
        "UnknownOperationException", "InternalFailure")
    signed = {"X-Amz-Target": "SageMaker.CreateEndpoint", "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/eu-west-1/sagemaker/aws4_request, Signature=x"}
    for name, answer in {"EndpointNam": "Unknown parameter", "EndpointName": "satisfy regular expression pattern"}.items():  # what botocore would not send
        request = urllib.request.Request(aws.server.url, json.dumps({"EndpointName": "a", "EndpointConfigName": "a", name: "no good!"}).encode(), signed)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        told = json.loads(caught.value.read())
        assert told["__type"] == "ValidationException" and answer in told["message"]


# Shifting, alarms, rollback -----------------------------------------------------------------------------------------------


def test_a_failing_canary_is_rolled_back_by_its_alarm_and_touches_no_more_than_its_share(aws: Aws, serving: str, tiny_bundle: Path) -> None:
    aws.model("failing", tiny_bundle)
    before = aws.client("sagemaker").describe_endpoint(EndpointName=serving)["EndpointConfigName"]
    policy = {**CANARY, "AutoRollbackConfiguration": {"Alarms": [{"AlarmName": aws.alarm(serving)}]}}
    outcomes: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(aws.client("sagemaker-runtime").exceptions.ModelError):
            aws.ask(serving)
            outcomes.append(True)
            return
        outcomes.append(False)

    with aws.faults({"kind": "model_error", "model": "failing"}):
        aws.client("sagemaker").update_endpoint(EndpointName=serving, EndpointConfigName=aws.config("failing", {"main": "failing"}), DeploymentConfig=policy)
        told = aws.settled(serving, meanwhile=ask)
    assert told["EndpointStatus"] == "InService" and told["EndpointConfigName"] == before
    assert told["FailureReason"] == "The following alarms went into ALARM during the deployment: errors"
    assert 1 <= outcomes.count(False) <= 0.1 * len(outcomes)
    assert release(aws.ask(serving)) == "7"
    assert {m["MetricName"] for m in aws.client("cloudwatch").list_metrics(Namespace="AWS/SageMaker")["Metrics"]} == {
        "Invocations", "Invocation4XXErrors", "Invocation5XXErrors", "ModelLatency", "OverheadLatency"}


def test_traffic_shifts_in_steps_and_no_request_is_lost(aws: Aws, serving: str, another: Callable[[str], Path]) -> None:
    aws.model("nine", another("9"))
    steps = {"Type": "LINEAR", "WaitIntervalInSeconds": 600, "LinearStepSize": {"Type": "CAPACITY_PERCENT", "Value": 50}}
    policy = {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": steps, "TerminationWaitInSeconds": 120}}
    aws.client("sagemaker").update_endpoint(EndpointName=serving, EndpointConfigName=aws.config("nine", {"main": "nine"}), DeploymentConfig=policy)
    seen: list[str] = []

    def ask() -> None:
        with ThreadPoolExecutor(4) as pool:
            seen.extend(pool.map(lambda _: release(aws.ask(serving)), range(8)))

    assert aws.settled(serving, meanwhile=ask)["EndpointConfigName"] == "nine"
    first, last = seen.index("9"), len(seen) - seen[::-1].index("7")
    assert set(seen[last:]) == {"9"} and 0.35 < Counter(seen[first:last])["9"] / (last - first) < 0.65, seen
    told = aws.client("sagemaker").describe_endpoint(EndpointName=serving)
    assert told["LastDeploymentConfig"] == policy and "PendingDeploymentSummary" not in told


def test_weights_shadow_and_capture(aws: Aws, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    for name, bundle in {"a": tiny_bundle, "b": another("b")}.items():
        aws.model(name, bundle)
    aws.create("ab", aws.config("ab", {"a": "a", "b": "b"}))
    assert {aws.ask("ab", TargetVariant=v)["variant"] for v in ("a", "b")} == {"a", "b"}
    wish = [{"VariantName": "a", "DesiredWeight": 0.0, "DesiredInstanceCount": 1}, {"VariantName": "b", "DesiredWeight": 3.0, "DesiredInstanceCount": 2}]
    aws.client("sagemaker").update_endpoint_weights_and_capacities(EndpointName="ab", DesiredWeightsAndCapacities=wish)
    told = aws.settled("ab")["ProductionVariants"]
    assert [(v["CurrentWeight"], v["CurrentInstanceCount"]) for v in told] == [(0.0, 1), (3.0, 2)]
    assert {aws.ask("ab")["variant"] for _ in range(10)} == {"b"}

    aws.client("sagemaker").update_endpoint(EndpointName="ab", EndpointConfigName=aws.config("shadowed", {"a": "a"}, shadow="b", DataCaptureConfig=CAPTURE))
    told = aws.settled("ab")
    assert [v["VariantName"] for v in told["ShadowProductionVariants"]] == ["shadow"] and told["DataCaptureConfig"]["CaptureStatus"] == "Started"
    answers = [aws.ask("ab", text, InferenceId=f"id-{n}") for n, text in enumerate(TEXTS)]
    assert {(a["variant"], release(a)) for a in answers} == {("a", "7")}
    assert error(lambda: aws.ask("ab", TargetVariant="shadow"))[0] == "ValidationError"
    aws.client("sagemaker").delete_endpoint(EndpointName="ab")
    aws.client("sagemaker").get_waiter("endpoint_deleted").wait(EndpointName="ab", WaiterConfig={"Delay": 1, "MaxAttempts": 60})
    s3, events = aws.client("s3"), {}
    for item in s3.list_objects_v2(Bucket="models-eu-west-1", Prefix="capture/ab/")["Contents"]:
        _, _, variant, year, month, day, hour, name = item["Key"].split("/")
        assert name.endswith(".jsonl") and len(year) == 4 and all(len(part) == 2 for part in (month, day, hour))
        lines = s3.get_object(Bucket="models-eu-west-1", Key=item["Key"])["Body"].read().splitlines()
        events.setdefault(variant, []).extend(map(json.loads, lines))
    assert {variant: len(found) for variant, found in events.items()} == {"a": 6, "shadow": 6}
    by_id = {e["eventMetadata"]["inferenceId"]: e["captureData"] for e in events["shadow"]}
    assert [json.loads(by_id[f"id-{n}"]["endpointInput"]["data"])["text"] for n in range(6)] == TEXTS
    assert {json.loads(c["endpointOutput"]["data"])["model"]["version"] for c in by_id.values()} == {"b"}


@pytest.mark.soak
def test_updates_under_load_in_two_regions_lose_no_request(aws: Aws, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    eleven, done, wrong = another("11"), False, []
    answers: Counter[tuple[str, str]] = Counter()
    for region in (IRELAND, OHIO):
        for name, bundle in {"load-7": tiny_bundle, "load-11": eleven}.items():
            aws.model(name, bundle, region)
            aws.config(name, {"main": name}, region)
        aws.create("load", "load-7", region)

    def ask(n: int) -> None:
        region = (IRELAND, OHIO)[n % 2]
        while not done:
            try:
                answers[region, release(aws.ask("load", TEXTS[n % 6], region))] += 1
            except Exception as e:
                wrong.append(f"{region}: {e}")

    steps = {"Type": "LINEAR", "WaitIntervalInSeconds": 600, "LinearStepSize": {"Type": "CAPACITY_PERCENT", "Value": 20}}
    policy = {"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": steps}}
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, n) for n in range(8)]
        for config in ("load-11", "load-7", "load-11"):
            for region in (IRELAND, OHIO):
                aws.client("sagemaker", region).update_endpoint(EndpointName="load", EndpointConfigName=config, DeploymentConfig=policy)
            assert [aws.settled("load", region)["EndpointConfigName"] for region in (IRELAND, OHIO)] == [config, config]
        done = True
        for future in asking:
            future.result()
    assert not wrong and min(answers.values()) > 50 and len(answers) == 4, (wrong[:3], answers)


# What goes wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "says"), [
    ({"kind": "no_capacity"}, "InsufficientInstanceCapacity"),
    ({"kind": "unhealthy"}, "did not pass the ping health check"),
    ({"kind": "slow_start", "seconds": 300}, "did not pass the ping health check"),
    ({"kind": "slow_start", "seconds": 120}, ""),
])
def test_an_update_that_cannot_start_leaves_the_old_fleet_in_service(aws: Aws, serving: str, fault: dict[str, Any], says: str) -> None:
    before = aws.client("sagemaker").describe_endpoint(EndpointName=serving)
    model = aws.client("sagemaker").describe_endpoint_config(EndpointConfigName=before["EndpointConfigName"])["ProductionVariants"][0]["ModelName"]
    config = aws.config(f"try-{fault['kind'].replace('_', '-')}-{fault.get('seconds', 0)}", {"main": model})
    with aws.faults({**fault, "endpoint": serving}):
        aws.client("sagemaker").update_endpoint(EndpointName=serving, EndpointConfigName=config)
        told = aws.settled(serving, meanwhile=lambda: aws.ask(serving))
    assert told["EndpointStatus"] == "InService"
    assert told["EndpointConfigName"] == (before["EndpointConfigName"] if says else config)
    assert says in told.get("FailureReason", "") and bool(says) == ("FailureReason" in told)


def test_what_never_started_has_failed_and_can_be_deleted(aws: Aws, serving: str) -> None:
    with aws.faults({"kind": "no_capacity", "region": IRELAND, "endpoint": "never"}):
        told = aws.create("never", "seven")
    assert told["EndpointStatus"] == "Failed" and "InsufficientInstanceCapacity" in told["FailureReason"]
    assert error(lambda: aws.client("sagemaker").update_endpoint(EndpointName="never", EndpointConfigName="seven"))[1].startswith("Cannot update failed endpoint")
    aws.client("sagemaker").delete_endpoint(EndpointName="never")


def test_quotas_are_told_and_kept(aws: Aws, serving: str) -> None:
    def told(region: str) -> float:
        pages = aws.client("service-quotas", region).get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
        return next(q["Value"] for page in pages for q in page["Quotas"] if q["QuotaName"] == "ml.m5.large for endpoint usage")

    with aws.faults({"kind": "no_quota", "region": IRELAND}):
        assert (told(IRELAND), told(OHIO)) == (0, 20)
        assert error(lambda: aws.create("dear", "seven"))[0] == "ResourceLimitExceeded"


def test_calls_fail_on_demand_and_a_region_can_be_down(aws: Aws, serving: str) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ConnectionClosedError, HTTPClientError

    once = Config(retries={"total_max_attempts": 1})
    sagemaker = boto3.client("sagemaker", region_name=IRELAND, config=once)
    denied = {"kind": "error", "operation": "InvokeEndpoint", "code": "AccessDeniedException"}
    with aws.faults({"kind": "error", "operation": "ListModels", "skip": 1, "times": 1}, denied):
        sagemaker.list_models()
        assert error(sagemaker.list_models) == ("ThrottlingException", "Rate exceeded")
        sagemaker.list_models()
        assert error(lambda: aws.ask(serving))[0] == "AccessDeniedException"
    asked = {"s3": lambda c: c.put_object(Bucket="models-eu-west-1", Key="a", Body=b"a"), "ecr": lambda c: c.describe_repositories(), "iam": lambda c: c.list_roles(),
             "cloudwatch": lambda c: c.describe_alarms(), "service-quotas": lambda c: c.list_service_quotas(ServiceCode="sagemaker")}
    for service, call in asked.items():  # each protocol has its own errors
        client = boto3.client(service, region_name=IRELAND, config=once)
        with aws.faults({"kind": "error", "code": "AccessDenied"}):
            assert error(lambda call=call, client=client: call(client)) == ("AccessDenied", "Planted by the rehearsal's faults"), service
        call(client)
    with aws.faults({"kind": "down", "region": IRELAND}):
        for service in ("sagemaker", "s3"):
            client = boto3.client(service, region_name=IRELAND, config=once)
            with pytest.raises((ConnectionClosedError, HTTPClientError)):
                client.list_models() if service == "sagemaker" else client.list_buckets()
        aws.client("sagemaker", OHIO).list_models()
    aws.calls()
    aws.client("s3").list_buckets()
    sagemaker.list_models()
    assert [(c["service"], c["operation"], c["status"]) for c in aws.calls()] == [("s3", "ListBuckets", 200), ("sagemaker", "ListModels", 200)]
    request = urllib.request.Request(f"{aws.server.url}/-/faults", b'[{"kind": "earthquake"}]', method="PUT")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert "expected one of error, down, slow_start" in caught.value.read().decode()


# Other people's clients ---------------------------------------------------------------------------------------------------


def test_the_sagemaker_sdk_works_on_it(aws: Aws, tiny_bundle: Path, another: Callable[[str], Path]) -> None:
    import boto3
    from sagemaker.core.resources import Endpoint, EndpointConfig, Model
    from sagemaker.core.shapes import BlueGreenUpdatePolicy, CapacitySize, ContainerDefinition, DeploymentConfig, ProductionVariant, TrafficRoutingConfig

    session = boto3.Session(region_name=IRELAND)
    for name, bundle in {"sdk-1": tiny_bundle, "sdk-2": another("sdk-2")}.items():
        container = ContainerDefinition(image=IMAGE.format(IRELAND), model_data_url=aws.upload(bundle), environment={"A": "b"})
        model = Model.create(model_name=name, primary_container=container, execution_role_arn=aws.server.role, session=session, region=IRELAND)
        assert model.get_name() == name
        variant = ProductionVariant(variant_name="main", model_name=name, instance_type="ml.m5.large", initial_instance_count=1)
        EndpointConfig.create(endpoint_config_name=name, production_variants=[variant], session=session, region=IRELAND)
    endpoint = Endpoint.create(endpoint_name="sdk", endpoint_config_name="sdk-1", session=session, region=IRELAND)
    endpoint.wait_for_status("InService", poll=1)
    told = endpoint.invoke(body=json.dumps({"text": "yes call"}).encode(), content_type="application/json", session=session, region=IRELAND)
    assert json.loads(told.body.read())["predictions"][0]["label"] == "positive"
    routing = TrafficRoutingConfig(type="CANARY", wait_interval_in_seconds=60, canary_size=CapacitySize(type="CAPACITY_PERCENT", value=50))
    endpoint.endpoint_config_name = "sdk-2"
    endpoint.update(deployment_config=DeploymentConfig(blue_green_update_policy=BlueGreenUpdatePolicy(traffic_routing_configuration=routing)))
    endpoint.wait_for_status("InService", poll=1)
    assert Endpoint.get(endpoint_name="sdk", session=session, region=IRELAND).endpoint_config_name == "sdk-2" and release(aws.ask("sdk")) == "sdk-2"
    assert "sdk" in [e.endpoint_name for e in Endpoint.get_all(session=session, region=IRELAND)]
    endpoint.delete()
    endpoint.wait_for_delete(poll=1)
    for name in ("sdk-1", "sdk-2"):
        EndpointConfig.get(endpoint_config_name=name, session=session, region=IRELAND).delete()
        Model.get(model_name=name, session=session, region=IRELAND).delete()


def test_mlflows_sagemaker_client_works_on_it(aws: Aws, tiny_bundle: Path, tmp_path: Path, state: Path) -> None:
    import pandas as pd
    from mlflow.deployments import get_deploy_client

    from textrelay.flavor import save_model

    save_model(tiny_bundle, tmp_path / "model")
    uri = str(tmp_path / "model")
    client = get_deploy_client(f"sagemaker:/{OHIO}")
    config = {"execution_role_arn": aws.server.role, "bucket": f"models-{OHIO}", "image_url": IMAGE.format(OHIO), "instance_type": "ml.m5.large", "instance_count": 1,
              "region_name": OHIO, "timeout_seconds": 60, "synchronous": False, "archive": True}
    assert client.create_deployment("mlflow", uri, flavor="python_function", config=config)["name"] == "mlflow"
    aws.settled("mlflow", OHIO)
    frame = pd.DataFrame({"text": TEXTS[:3]})
    assert [row["label"] for row in client.predict("mlflow", frame)["predictions"]] == LABELS
    first = client.get_deployment("mlflow")["EndpointConfigName"]
    client.update_deployment("mlflow", uri, flavor="python_function", config={**config, "mode": "replace", "variant_name": "second"})
    assert aws.settled("mlflow", OHIO)["EndpointConfigName"] != first
    assert [row["label"] for row in client.predict("mlflow", frame)["predictions"]] == LABELS
    assert [e["EndpointName"] for e in client.list_deployments()] == ["mlflow"]
    client.delete_deployment("mlflow", config={"region_name": OHIO, "synchronous": False, "archive": True})


# The command --------------------------------------------------------------------------------------------------------------


def test_the_command_says_what_to_set_and_ends_with_all_it_started(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import free_port

    port, log = free_port(), tmp_path / "log"
    command = [str(Path(sys.executable).parent / "textrelay"), "rehearse", "--port", str(port), "--speed", "600", "--prepare", str(ROOT / "params/rehearsal.yaml")]
    with running(command, f"http://127.0.0.1:{port}/-/faults", log, dict(os.environ)) as process:
        deadline = time.monotonic() + 60
        while "rehearsing at" not in log.read_text() and time.monotonic() < deadline:  # it listens before all is prepared
            time.sleep(0.05)
        told = dict(line.removeprefix("export ").split("=", 1) for line in log.read_text().splitlines() if line.startswith("export "))
        assert told["AWS_ENDPOINT_URL"] == f"http://127.0.0.1:{port}"
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        placed = subprocess.run([command[0], "deploy", str(tiny_bundle), "prepared", "--params", command[-1], "--json"], capture_output=True, text=True, timeout=300)
        assert placed.returncode == 0 and json.loads(placed.stdout)["release"] == read_bundle(tiny_bundle).facts["release"], placed.stderr
        server = type("Elsewhere", (), {"url": told["AWS_ENDPOINT_URL"], "role": "arn:aws:iam::123456789012:role/textrelay-rehearsal"})()
        aws = Aws(server)
        aws.model("one", tiny_bundle)
        aws.create("one", aws.config("one", {"main": "one"}))
        assert aws.ask("one")["predictions"][0]["label"] == "positive"
        fronts = [p for p in psutil.Process(process.pid).children(recursive=True) if "textrelay.serving" in p.cmdline()]
        assert len(fronts) == 3, "one of each region, and this one"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in fronts)
    helped = subprocess.run([*command[:2], "--help"], capture_output=True, text=True, timeout=60).stdout
    assert "does not imitate" in helped
