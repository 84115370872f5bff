"""What a person submits a job with: secrets, results and links in the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cifar_dist.errors import UserError
from launch.packing import package
from tests.conftest import PYTHON_PATH
from tests.processes import PATIENCE_S

KEY = "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\n"
SECRETS = {
    ".env": "A=1", ".aws/credentials": "x", ".ssh/id_rsa": KEY, ".netrc": "x", ".kube/config": "x",
    "keys/server.pem": KEY, "service-account.json": "{}", ".ray-17/token": "x",
    # Google's names of service accounts are those of the project.
    "my-project-1a2b.json": '{"private_key": "' + KEY.replace("\n", "\\n") + '"}',
    ".config/gh/hosts.yml": "x", "deploy/.ENV.production": "x", "home/.docker/config.json": "{}",
}  # fmt: skip
CODE = {"nets/wide.py": "x = 1\n", "conf.yaml": "lr: 1\n", ".env.example": "A=\n"}
RESULTS = {
    "wandb/run-1/out.log": "x", "mlruns/0/meta.yaml": "x", "node_modules/d3/index.js": "x",
    "best.pt": "x", "old.tar.gz": "x", "data/x.bin": "x", "runs/r/metrics.csv": "x",
    ".venv/bin/python": "x", "nets/__pycache__/wide.pyc": "x",
}  # fmt: skip


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize("place", ["checkout", "checkout with everything added", "folder"])
def test_submitting_from_a_folder_with_secrets_and_results_sends_the_code(
    tmp_path: Path, place: str
) -> None:
    fill(tmp_path, CODE | SECRETS | RESULTS)
    if place != "folder":
        git(tmp_path, "init")
        git(tmp_path, "add", "nets/wide.py", "conf.yaml")
    added = place == "checkout with everything added"
    if added:
        git(tmp_path, "add", ".")
    found = package(tmp_path)
    # What git tracks is meant to be there; secrets are sent all the same to nobody.
    assert found.files.keys() == (CODE | RESULTS if added else CODE).keys()
    assert found.untracked == ([".env.example"] if place == "checkout" else [])
    said = "\n".join(found.lines())
    assert f"sends {len(found.files)} files, 0.0 MB" in said
    for name in (".env", ".aws/", ".ssh/", "keys/server.pem", "my-project-1a2b.json"):
        assert name in said


def test_submitting_from_a_checkout_sends_no_ignored_and_names_new_files(tmp_path: Path) -> None:
    git(tmp_path, "init")
    fill(tmp_path, {".gitignore": "*.log\n", "a.py": "", "b.log": "", "gone.py": "", "new.py": ""})
    git(tmp_path, "add", ".gitignore", "a.py", "gone.py")
    (tmp_path / "gone.py").unlink()
    found = package(tmp_path)
    assert sorted(found.files) == [".gitignore", "a.py", "new.py"]
    assert "of them not tracked by git: new.py" in found.lines()
    # An unpacked archive of the same checkout ignores the same.
    fill(tmp_path / "unpacked", {".gitignore": "*.log\n", "a.py": "", "b.log": ""})
    assert "unpacked/b.log" not in package(tmp_path).files


@pytest.mark.parametrize("target", ["/etc/passwd", "../elsewhere", "../elsewhere/notes.txt"])
def test_submitting_with_a_link_out_of_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path, {"elsewhere/notes.txt": "private", "work/a.py": ""})
    (tmp_path / "work" / "link").symlink_to(target)
    with pytest.raises(UserError, match=r"link: is a link to .*, outside of the folder"):
        package(tmp_path / "work")


def test_submitting_with_links_inside_the_folder_sends_each_file_once_a_link(
    tmp_path: Path,
) -> None:
    fill(tmp_path, {"conf/v2/lr.yaml": "lr: 1", ".env": "A=1"})
    for name, target in (("loop", "."), ("conf/up", ".."), ("current", "conf/v2"),
                         ("lr.yaml", "current/lr.yaml"), ("settings", ".env"),
                         ("one", "other"), ("other", "one"), ("broken", "nothing")):  # fmt: skip
        (tmp_path / name).symlink_to(target)
    found = package(tmp_path)
    assert sorted(found.files) == ["conf/v2/lr.yaml", "current/lr.yaml", "lr.yaml"]
    assert any("loop" in line and "settings" in line for line in found.lines())


def test_submitting_from_a_folder_of_more_than_100_mib_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, {"a.py": "x"})
    with (tmp_path / "images.raw").open("wb") as file:
        file.truncate(101 * 2**20)
    with pytest.raises(UserError, match=r"have 101 MiB.*the largest: images.raw \(101.0 MiB\)"):
        package(tmp_path)


@pytest.mark.parametrize("name", ["best.pt", "ignored.yaml", ".env"])
def test_submitting_a_command_that_names_a_file_which_is_not_sent_is_refused(
    tmp_path: Path, name: str
) -> None:
    fill(tmp_path, {"conf.yaml": "", "best.pt": "", "ignored.yaml": "", ".env": "",
                    ".gitignore": "ignored*"})  # fmt: skip
    package(tmp_path, ["train", "--config", "./conf.yaml"])
    for words in (["--config", name], [f"--weights={name}"]):
        with pytest.raises(UserError, match=f"{name}: is not sent with the job; give an absolute"):
            package(tmp_path, ["train", *words])


def test_submitting_without_git_installed(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path, CODE | SECRETS | RESULTS)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert package(tmp_path).files.keys() == CODE.keys()
    (tmp_path / ".gitignore").touch()
    with pytest.raises(UserError, match="git is not installed"):
        package(tmp_path)


def test_submitting_twice_sends_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "work", CODE)
    for name, time in (("1.zip", 10**9), ("2.zip", 2 * 10**9)):
        os.utime(tmp_path / "work" / "conf.yaml", (time, time))
        package(tmp_path / "work").write(tmp_path / name)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as packed:
        assert packed.read("conf.yaml") == b"lr: 1\n"
        assert set(packed.namelist()) == CODE.keys()


def test_submitting_where_files_vanish_or_there_is_no_room_is_one_line(tmp_path: Path) -> None:
    fill(tmp_path / "work", {"a.py": "x"})
    chosen = package(tmp_path / "work")
    with pytest.raises(UserError, match=r"TMPDIR .*: cannot be written \(No such file"):
        chosen.write(tmp_path / "none" / "a.zip")
    (tmp_path / "work" / "a.py").unlink()
    with pytest.raises(UserError, match=r"a.py: cannot be read \(No such file"):
        chosen.write(tmp_path / "a.zip")


def test_submitting_with_a_file_that_nobody_may_read_or_whose_name_is_not_utf8(
    tmp_path: Path, monkeypatch
) -> None:
    fill(tmp_path, {"a.py": "x"})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.py")).touch()
    found = package(tmp_path)
    assert found.files.keys() == {"a.py"}
    assert "not sent (names that are not UTF-8): 'caf\\udce9.py'" in found.lines()
    if os.geteuid() == 0:
        return  # root may read everything
    (tmp_path / "a.py").chmod(0)
    with pytest.raises(UserError, match=r"a.py: cannot be read \(Permission denied\)"):
        package(tmp_path)


def test_a_refused_submission_is_one_line_and_needs_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "hosts").symlink_to("/etc/hosts")
    done = subprocess.run(
        [sys.executable, "-m", "launch.submit", "--address", "http://127.0.0.1:1", "--", "train",
         "--dataset", "digits", "--storage-path", "/shared"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": PYTHON_PATH}, capture_output=True,
        text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: hosts: is a link to /etc/hosts")
    assert len(done.stderr.splitlines()) == 1
