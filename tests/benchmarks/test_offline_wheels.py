"""Wheels for a machine without a network."""

from __future__ import annotations

import zipfile
from pathlib import Path

from benchmarks.offline_wheels import needs_of, without_jars


def test_a_wheel_loses_its_java_archives_and_lists_them_no_more(tmp_path: Path) -> None:
    wheel = tmp_path / "ray-2.60.0-cp312-cp312-manylinux2014_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ray/__init__.py", "x = 1\n")
        archive.writestr("ray/jars/ray_dist.jar", b"0" * 1000)
        archive.writestr(
            "ray-2.60.0.dist-info/RECORD", "ray/__init__.py,,\nray/jars/ray_dist.jar,,\n"
        )
    without_jars(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == ["ray/__init__.py", "ray-2.60.0.dist-info/RECORD"]
        assert archive.read("ray-2.60.0.dist-info/RECORD") == b"ray/__init__.py,,\n"
        assert archive.read("ray/__init__.py") == b"x = 1\n"
    assert [file.name for file in tmp_path.iterdir()] == [wheel.name]


def test_what_a_wheel_needs_is_read_from_its_metadata(tmp_path: Path) -> None:
    wheel = tmp_path / "pydantic-2.0-py3-none-any.whl"
    needs = ("pydantic-core==2.50.5", "typing-extensions>=4", "email-validator; extra == 'email'")
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = [f"Requires-Dist: {each}" for each in needs]
        archive.writestr("pydantic-2.0.dist-info/METADATA", "\n".join(["Name: pydantic", *lines]))
    assert needs_of(wheel) == ["pydantic-core==2.50.5"]
