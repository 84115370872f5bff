"""Collect the wheels that a GPU machine without a network lacks for running this project.

``python -m benchmarks.offline_wheels FOLDER`` downloads them for Python 3.12 on Linux, each without
its dependencies: such a machine has PyTorch, Lightning and the rest of
``benchmarks/gpu_machine.txt``, but neither Ray nor tyro. There, install them with ``python3 -m pip
install --no-index --no-deps --no-compile --target SITE FOLDER/*.whl``, and put SITE on PYTHONPATH.
Ray's wheel loses its Java archives, which Python never loads, so that all stay below 60 MiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

REQUIREMENTS = (
    "ray==2.60.0",
    "tyro>=1.0",
    "docstring-parser",
    "typeguard",
    "jsonschema",
    "jsonschema-specifications",
    "referencing",
    "rpds-py",
    "pydantic",
    "tensorboardX",
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
JARS = "ray/jars/"


def collect(folder: Path, more: Sequence[str] = ()) -> list[Path]:
    """Download all wheels into a folder, in place of those that are there, and return them.

    Args:
        folder: where to; it is made.
        more: further requirements, in pip's notation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    _download(folder, [*REQUIREMENTS, *more])
    _download(folder, needs_of(next(folder.glob("pydantic-[0-9]*.whl"))))
    without_jars(next(folder.glob("ray-*.whl")))
    return sorted(folder.glob("*.whl"))


def _download(folder: Path, requirements: Sequence[str]) -> None:
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps",
            "--python-version", "3.12", "--implementation", "cp", *platforms,
            "--dest", str(folder), *requirements,
        ],
        check=True,
    )  # fmt: skip


def needs_of(wheel: Path) -> list[str]:
    """Return what a wheel requires, extras and ``typing-extensions`` (which torch brings) aside.

    pydantic works with one version of pydantic-core only, which its own metadata names.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    needs = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [n for n in needs if "extra ==" not in n and not n.startswith("typing-extensions")]


def without_jars(wheel: Path) -> None:
    """Rewrite Ray's wheel without its Java archives, in its list of files too."""
    slim = wheel.with_suffix(".slim")
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for item in old.infolist():
            if item.filename.startswith(JARS):
                continue
            content = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.splitlines(keepends=True)
                content = b"".join(each for each in lines if not each.startswith(JARS.encode()))
            new.writestr(item, content, compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)
    slim.replace(wheel)


def main() -> None:
    """Collect the wheels, and print their sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("requirements", nargs="*", help="further ones, in pip's notation")
    chosen = parser.parse_args()
    wheels = collect(chosen.folder, chosen.requirements)
    sizes = [wheel.stat().st_size / 2**20 for wheel in wheels]
    for wheel, size in zip(wheels, sizes, strict=True):
        print(f"{size:7.1f} MiB  {wheel.name}")
    print(f"{sum(sizes):7.1f} MiB  in all")


if __name__ == "__main__":
    main()
