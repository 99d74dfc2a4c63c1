"""Folders that cannot be used end in one line that names them: without permission, read-only, full, or not a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_store import ROOT

from vce_ray.errors import UserError
from vce_ray.models.adapter_location import run_adapter
from vce_ray.sampling.compiled import compile_kernels
from vce_ray.storage.local_folder import local_path, temporary_folder, writable_folder
from vce_ray.storage.store import Store, StoreError

USE = """
import sys
import pyarrow as pa
from vce_ray.errors import UserError
from vce_ray.storage.store import Store, StoreError
try:
    store = Store(sys.argv[1])
    stage = store.stage('stage')
except UserError as error:
    print(error)
    sys.exit()
for operation in (
    lambda: store.write_bytes('a/b', b'1'),
    lambda: store.create_json('a/c', 1),
    lambda: stage.write_part(pa.table({'id': ['x']})),
    lambda: store.delete_prefix('old'),
):
    try:
        operation()
        print('done')
    except StoreError as error:
        print(error)
"""


def use(uri: str, cwd: Path = ROOT) -> list[str]:
    """Use a store in a process in which permissions bind root as well; return what it prints for each operation."""
    bound = []
    if os.getuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("permissions do not bind root")
        bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*bound, sys.executable, "-c", USE, uri]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB. Only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "vce-test", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the places for temporary files exists."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent/tmp")


def test_a_store_without_permission_is_named(tmp_path: Path) -> None:
    store = tmp_path / "runs"
    (store / "old").mkdir(parents=True)
    (store / "old/file").write_text("old")
    for folder in (store / "old", store):
        folder.chmod(0o500)
    for lines in (use(str(store)), use("runs", cwd=tmp_path), use(str(store / "new"))[:3], use(".", cwd=store)):
        for line in lines:
            assert f"{store}" in line and "failed after 1 attempt: Permission denied" in line, line
            assert "Check the path, its owner and its permissions" in line
    store.chmod(0)
    assert all("Permission denied" in line for line in use(str(store)))


def test_a_store_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "link").symlink_to(tmp_path / "not mounted")
    for place in ("file", "file/below", "link"):
        for operation in (
            lambda store: store.write_bytes("a", b"1"),
            lambda store: store.create_json("a", 1),
            lambda store: store.write_bytes("folder/a", b"1"),
        ):
            with pytest.raises(StoreError, match=rf"{tmp_path}/{place}.*(is a file|a file in place of a folder)"):
                operation(Store(tmp_path / place))
    with pytest.raises(StoreError, match=r"folder /proc/runs cannot be made \(No such file or directory\)"):
        Store("/proc/runs").write_bytes("a", b"1")
    (tmp_path / "runs/a").mkdir(parents=True)
    with pytest.raises(StoreError, match=rf"Is a directory {tmp_path}/runs/a\. Check the path: there is a file in"):
        Store(tmp_path / "runs").write_bytes("a", b"1")
    assert os.listdir(tmp_path / "runs") == ["a"]


def test_a_store_on_a_read_only_disk_is_named(small_disk: Path) -> None:
    (small_disk / "old").write_text("old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    lines = use(str(small_disk))
    assert len(lines) == 4
    for line in lines:
        assert f"{small_disk}" in line and "Read-only file system" in line, line
        assert "Check how its disk is mounted, or use a folder on another disk" in line


def test_a_path_that_cannot_be_resolved_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'~nobody-of-this-name/runs' cannot be resolved \(no such home folder\)"):
        Store("~nobody-of-this-name/runs")
    code = "import os, sys; os.rmdir(os.getcwd()); " + USE
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, "runs"],
        cwd=gone,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "'runs' cannot be resolved (the current folder was deleted): give an absolute path\n"
    assert local_path("~") == Path.home()


def test_a_folder_that_a_user_names_is_checked(tmp_path: Path, small_disk: Path) -> None:
    assert writable_folder(tmp_path / "a/b", "--out").is_dir() and not any((tmp_path / "a/b").iterdir())
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/file \(File exists\): set --out to a folder"):
        writable_folder(tmp_path / "file", "--out")
    with pytest.raises(UserError, match=r"has [\d,]+ bytes free, 8,000,000 are needed: .* set CACHE to a folder"):
        writable_folder(small_disk, "CACHE", needed=8_000_000)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=rf"cannot write {small_disk} \(Read-only file system\): set --out"):
        writable_folder(small_disk, "--out")


def test_a_temporary_folder_that_cannot_be_made_is_an_error_of_the_store(
    tmp_path: Path, no_temporary_folder: None
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/file").write_text("x")
    store = Store(tmp_path / "run")
    store.upload(tmp_path / "adapter", "adapter")
    with pytest.raises(StoreError, match=r"no temporary folder can be made \(.*\): set TMPDIR to a folder with free"):
        run_adapter(store).__enter__()


def test_kernels_are_not_compiled_without_a_temporary_folder(
    no_temporary_folder: None, caplog: pytest.LogCaptureFixture
) -> None:
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no compiler")
    assert compile_kernels() is None
    assert "without compiled kernels" in caplog.text and "/nonexistent/tmp" in caplog.text


@pytest.mark.parametrize("library", ["python", "torch"])
def test_a_full_temporary_folder_is_an_error_of_the_store(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))

    def fill(file: Path) -> None:
        if library == "torch":
            torch.save(torch.zeros(2_000_000), file)
        else:
            file.write_bytes(bytes(8_000_000))

    full = rf"the disk of {small_disk}/.* is full: free some space, or set TMPDIR"
    with pytest.raises(StoreError, match=full), temporary_folder() as folder:
        fill(folder / "file")
    assert not any(small_disk.iterdir())
    with pytest.raises(RuntimeError, match="unrelated"), temporary_folder():
        raise RuntimeError("unrelated")
