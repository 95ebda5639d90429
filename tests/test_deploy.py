"""deploy/: files are parsed and compared with Ray's own schema and defaults, KubeRay's
requirements, and the project's files."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from extract.__main__ import Options

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def test_the_cluster_file_is_one_that_ray_takes():
    import jsonschema
    import ray
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    assert config["head_node_type"] in config["available_node_types"]
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}  # no worker runs next to the driver
    assert [name for name, node in types.items() if "GPU" in node["resources"]] == ["gpu"]
    assert config["max_workers"] >= sum(node["max_workers"] for node in types.values())
    validate_config(fillout_defaults(config))


def test_the_job_file_has_what_kuberay_asks_for():
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9-]+", job["metadata"]["name"])
    spec = job["spec"]
    assert set(spec) <= {"entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
    cluster = spec["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "requirements.lock").read_text()
    groups = cluster["workerGroupSpecs"]
    for group in groups:
        assert {
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
            "rayStartParams",
            "template",
        } == set(group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *groups):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {"name", "image", "resources"} <= set(container)
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    command = shlex.split(spec["entrypoint"])
    assert command[:3] == ["python", "-m", "extract"]
    flags = {word[2:].replace("-", "_") for word in command if word.startswith("--")}
    assert flags <= set(Options.__dataclass_fields__)


def test_the_image_holds_every_room_and_the_locked_versions():
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {name for name, _ in steps} <= {"FROM", "WORKDIR", "COPY", "RUN"}
    copied = [name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"requirements.lock", "extract", "aggregate", "ensemble", "pipelines"} <= set(copied)
    assert "-r requirements.lock" in next(rest for step, rest in steps if step == "RUN")
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no Docker daemon runs here: the image was not built")
    subprocess.run(
        ["docker", "build", "-q", "-f", str(DEPLOY / "Dockerfile"), str(ROOT)], check=True
    )
