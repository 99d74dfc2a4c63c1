"""The checks of vce-ray doctor on this machine and the cluster, and all checks together."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from test_doctor import SECRET, only_failure

from vce_ray.cli.doctor import Asked, cluster, machine, run_checks
from vce_ray.models.shape import SHAPES
from vce_ray.sampling.memory import HostMemory, fitting_batch

SHARED_MEMORY = Path("/dev/shm").exists()


def test_wrong_versions() -> None:
    requirements = ["torch>=2.13", "pyarrow<1", "ray[data]>=2.60", "no-such-package>=3", 'moto<1; extra == "test"']
    failure = only_failure([machine.check_versions(requirements, ">=3.11")])
    assert failure.name == "versions"
    assert failure.found == f"pyarrow {metadata.version('pyarrow')}, no-such-package missing"
    assert failure.fix == "pip install 'pyarrow<1' 'no-such-package>=3'"
    assert machine.check_versions(requirements[:1], ">=3.11").ok
    failure = only_failure([machine.check_versions(requirements[:1], "<3.0")])
    assert failure.found.startswith("Python 3.") and failure.fix == "recreate .venv with Python <3.0"


def test_torchvision_built_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_torchvision().ok
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    failure = only_failure([machine.check_torchvision()])
    assert failure.found == "RuntimeError: operator torchvision::nms does not exist"
    assert failure.fix.startswith("install torch and torchvision of the same release from the same index")


def test_gpus_are_listed_and_not_required() -> None:
    import torch

    check = machine.check_gpus()
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    assert check.ok and not check.fix
    assert all(name in check.found for name in names) and (check.found == "CPU only") == (not names)


@pytest.mark.parametrize("base", ["janus-pro-7b", "deepseek-community/Janus-Pro-7B@refs/pr/1", "models/janus-pro-7b"])
def test_too_little_memory_for_a_base(base: str) -> None:
    failure = only_failure([machine.check_memory(base, 8e9, "the GPU")])
    assert failure.found == "janus-pro-7b needs 16.54 GB for one image, the GPU has 8.00 GB free"
    assert failure.fix == "use a smaller --base, or a device with more memory (see vce-ray plan)"
    assert machine.check_memory(base, 16.5e9, "the GPU").ok is False
    assert fitting_batch(SHAPES["janus-pro-7b"], 16.5e9, guided=True) == 0
    assert machine.check_memory(base, 16.6e9, "the GPU").ok is True
    assert fitting_batch(SHAPES["janus-pro-7b"], 16.6e9, guided=True) == 1


def test_memory_for_the_embedded_base_and_for_unknown_ones() -> None:
    assert machine.check_memory("emoji-world", 1e9, "this machine").ok
    failure = only_failure([machine.check_memory("emoji-world", 1e6, "this machine")])
    assert failure.found.startswith("emoji-world needs 0.0") and failure.fix.startswith("use a smaller --base")
    assert machine.check_memory("emoji-world", float("inf"), "this machine").ok
    unknown = machine.check_memory(f"s3://AKIA:{SECRET}@bucket/x", 1.0, "this machine")
    assert unknown.ok and "not checked" in unknown.found and SECRET not in unknown.line


def test_memory_of_a_container() -> None:
    assert machine.check_host_memory("emoji-world", HostMemory(1e9, None)).found.endswith(
        ", this machine has 1.00 GB free"
    )
    check = machine.check_host_memory("emoji-world", HostMemory(1e9, 2_000_000_000))
    assert check.ok and check.found.endswith("this container, limited to 2.00 GB, has 1.00 GB free")
    failure = only_failure([machine.check_host_memory("emoji-world", HostMemory(1e6, 2_000_000_000))])
    assert failure.fix == "raise the container's memory limit, or use a smaller --base"


def test_little_shared_memory_is_a_warning() -> None:
    check = machine.check_shared_memory(64e6)
    assert check.ok and check.line.startswith("warn  shared memory    0.1 GB free in /dev/shm. Fix: enlarge /dev/shm")
    assert "docker run --shm-size=8g" in check.fix
    assert machine.check_shared_memory(8e9).fix == ""


def test_a_cluster_that_cannot_be_joined(free_port: Callable[[], int]) -> None:
    fix = "set RAY_ADDRESS to host:port of the cluster's head and RAY_AUTH_TOKEN to its token, or unset RAY_ADDRESS"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        failure = only_failure([cluster.check_cluster(address, timeout_s=1.0)])
    assert failure.found == f"cannot join {address}: no response within 1 s" and failure.fix == fix
    failure = only_failure([cluster.check_cluster(f"127.0.0.1:{free_port()}", timeout_s=60.0)])
    assert "no cluster answers" in failure.found and failure.fix == fix
    failure = only_failure([cluster.check_cluster(f"http://user:{SECRET}@127.0.0.1:{free_port()}", timeout_s=60.0)])
    assert "must be host:port" in failure.found and SECRET not in failure.line and failure.fix == fix


def test_a_cluster_with_other_versions() -> None:
    from ray._private.utils import check_version_info  # what Ray calls when it joins a cluster

    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "2.59.0", "python_version": "3.12.1"}, "node 127.0.0.1")
    failure = only_failure([cluster.interpret_join("head:6379", f"RuntimeError: {mismatch.value}")])
    assert failure.found.startswith("head:6379 runs Ray 2.59.0 and Python 3.12.1, this machine has Ray ")
    assert failure.fix == "install ray==2.59.0 and Python 3.12.1 here, or submit the run with `ray job submit`"
    assert cluster.interpret_join("head:6379", "").ok


def test_without_a_compiler_sampling_is_said_to_be_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_step_compiler().found.endswith(" compiles the sampling step")
    fix = "install a C++ compiler (apt-get install g++)"
    monkeypatch.setenv("PATH", str(tmp_path))
    check = machine.check_step_compiler()
    assert check.ok and check.fix == fix and check.found.startswith("no C++ compiler")
    check = machine.check_triton_compiler()
    assert check.ok and check.fix == fix and check.found.startswith("no C compiler, which Triton needs")
    (tmp_path / "c++").write_text("#!/bin/sh\necho 'step.cpp:1: error: no OpenMP here' >&2; exit 1\n")
    (tmp_path / "c++").chmod(0o755)
    check = machine.check_step_compiler()
    assert check.ok and check.fix == fix
    assert check.found == f"{tmp_path}/c++ cannot compile the sampling step: step.cpp:1: error: no OpenMP here"
    monkeypatch.setenv("VCE_RAY_COMPILE", "0")
    assert machine.check_step_compiler().line.endswith("not used: VCE_RAY_COMPILE is 0")


def test_triton_needs_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/usr/bin/gcc")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in machine.check_triton_compiler().fix
    (tmp_path / "Python.h").touch()
    assert machine.check_triton_compiler().line.endswith("/usr/bin/gcc, for Triton")


def test_all_checks_of_this_machine_run_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    checks = list(run_checks(Asked(store=str(tmp_path))))
    names = ["disk", "store", "conditional put", "versions", "torch", "gpu", "compiler", "shared memory"]
    names += ["base", "memory", "judge", "captioner"]
    assert [check.name for check in checks] == [name for name in names if name != "shared memory" or SHARED_MEMORY]
    assert all(check.ok for check in checks), [check.line for check in checks]
