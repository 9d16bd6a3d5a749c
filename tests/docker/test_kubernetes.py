"""The Kubernetes job is valid, and its parts name each other right."""

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.docker.stubs import ROOT


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, Any]]:
    """By kind."""
    text = (ROOT / "docker/kubernetes/job.yaml").read_text(encoding="utf-8")
    return {resource["kind"]: resource for resource in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def pod(resources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return resources["Job"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", ["1.28", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["Service", "Job"])
def test_it_is_what_the_schema_of_kubernetes_allows(
    resources: dict[str, dict[str, Any]], kind: str, version: str
) -> None:
    kubernetes_validate.validate(resources[kind], version, strict=True)


def test_the_schema_tells_a_misspelt_key(resources: dict[str, dict[str, Any]]) -> None:
    job = {**resources["Job"], "spec": {**resources["Job"]["spec"], "completionsMode": "Indexed"}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.28", strict=True)


def test_every_node_finds_node_0_and_knows_how_many_there_are(
    resources: dict[str, dict[str, Any]], pod: dict[str, Any]
) -> None:
    job, service = resources["Job"], resources["Service"]
    environment = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NNODES"]["value"])
    # The pods of an indexed job are called NAME-INDEX, and found under the name of the headless service.
    assert environment["MASTER_ADDR"]["value"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert [port["port"] for port in service["spec"]["ports"]] == [int(environment["MASTER_PORT"]["value"])]


def test_the_container_is_not_root_and_its_volumes_are_there(pod: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"ARG USER_ID={pod['securityContext']['runAsUser']}\n" in dockerfile
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "WORKDIR /job\n" in dockerfile
    assert "persistentVolumeClaim" in mounts["/job"]


def test_the_tools_have_time_to_stop(pod: dict[str, Any]) -> None:
    """torchrun kills its processes sooner than Kubernetes the pod."""
    values = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    assert 600 <= int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) <= pod["terminationGracePeriodSeconds"] - 60


def test_pods_that_are_evicted_do_not_use_up_the_jobs_failures(
    resources: dict[str, dict[str, Any]], pod: dict[str, Any]
) -> None:
    job = resources["Job"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pod["restartPolicy"] == "Never"  # which the policy needs
    assert job["backoffLimit"] >= 8 * job["completions"]


def test_a_checkpoint_fits_in_the_memory_of_a_node(pod: dict[str, Any]) -> None:
    """Of each of 8 ranks 12 bytes a parameter of a quarter of 14.8 billion, and as much again for the rest."""
    size = re.fullmatch(r"(\d+)Gi", pod["containers"][0]["resources"]["requests"]["memory"])
    assert size is not None
    assert int(size[1]) * 2**30 > 2 * 8 * 12 * 14.8e9 / 4
