"""The GPU campaign on a CPU, in the GPU machine's environment: ``make gpu-rehearsal``.

Builds that environment once, in ``.gpu-venv``: Python 3.12 with ``benchmarks/gpu_machine.txt`` from
the package index, and what is missing to it as wheels (`benchmarks.offline_wheels`), installed as
on the machine without a network. Then, without a network, it runs every part of the campaign,
small, and the tests that need no Ray. Exits with 0 if all of it succeeded.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "benchmarks" / "gpu_machine.txt"
WANTED = "3.12"
APART = ("unshare", "--map-root-user", "--net")
"""A network namespace of its own, in which there is only loopback."""
LOOPBACK_UP = "import fcntl, socket, struct; " + "; ".join(
    (
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "fcntl.ioctl(s, 0x8914, struct.pack('16sh', b'lo', 0x1 | 0x40))",  # SIOCSIFFLAGS, UP
    )
)
WITHOUT_RAY = (
    "tests/benchmarks", "tests/data", "tests/model", "tests/config/test_train.py",
    "tests/runs/test_directory.py", "tests/search/test_space.py",
)  # fmt: skip
"""Tests that pass where neither Ray nor tyro is installed."""
WITH_WHEELS = ("tests/training",)
"""Tests that need tyro, and no Ray."""


def find_python(given: str) -> str:
    """Return a Python 3.12: the one given, or of PATH, or of pyenv; exit with a line if none."""
    root = os.environ.get("PYENV_ROOT") or str(Path.home() / ".pyenv")
    of_pyenv = sorted(glob.glob(f"{root}/versions/{WANTED}.*/bin/python{WANTED}"))
    found = [given] if given else [f"python{WANTED}", *reversed(of_pyenv)]
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for each in found:
        if (program := shutil.which(each)) is None:
            continue
        done = subprocess.run([program, "-c", ask], capture_output=True, text=True, check=False)
        if done.stdout.strip() == WANTED:
            return program
    where = given or f"PATH and {root}/versions"
    sys.exit(
        f"error: no Python {WANTED} at {where}: install one (pyenv install {WANTED}), or name it: "
        "make gpu-rehearsal GPU_REHEARSAL_PYTHON=/path/to/python3.12"
    )


def build(folder: Path, python: str, uv: str) -> None:
    """Build the environment, unless it is there as it would be built."""
    wheels_of = ROOT / "benchmarks" / "offline_wheels.py"
    built_from = hashlib.sha256(REQUIREMENTS.read_bytes() + wheels_of.read_bytes()).hexdigest()
    ready = folder / "ready"
    if ready.is_file() and ready.read_text() == built_from:
        return
    print(f"building {folder} (some 6 GB)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder)], check=True)
    its = str(folder / "bin" / "python")
    install = [uv, "pip", "install", "--quiet", "--python", its, "-r", str(REQUIREMENTS)]
    subprocess.run(install, check=True)
    wheels = folder / "wheels"
    subprocess.run([its, "-m", "benchmarks.offline_wheels", str(wheels)], cwd=ROOT, check=True)
    subprocess.run(
        [
            its, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
            "--target", str(folder / "site"), *map(str, sorted(wheels.glob("*.whl"))),
        ],
        check=True,
    )  # fmt: skip
    ready.write_text(built_from)


def isolated(words: list[str]) -> list[str]:
    """Return a command that runs another without a network, or with proxies that lead nowhere."""
    try_it = [*APART, sys.executable, "-c", LOOPBACK_UP]
    if shutil.which(APART[0]) and not subprocess.run(try_it, capture_output=True).returncode:
        start = f"{LOOPBACK_UP}; import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
        return [*APART, sys.executable, "-c", start, *words]
    print("no network namespace for this user: proxies that lead nowhere instead", flush=True)
    nowhere = "http://127.0.0.1:9"  # the port that discards
    names = ("http_proxy", "https_proxy", "all_proxy")
    proxies = [f"{each}={nowhere}" for name in names for each in (name, name.upper())]
    return ["env", *proxies, "no_proxy=127.0.0.1,localhost", *words]


def run_tests(python: str, path: list[Path], tests: Sequence[str]) -> int:
    """Run tests with these folders on PYTHONPATH; return pytest's exit code."""
    words = [
        python, "-m", "pytest", "-q", "--numprocesses", "2", "--dist", "loadfile",
        "-p", "no:cacheprovider", *tests,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(isolated(words), cwd=ROOT, env=env, check=False).returncode


def campaign(python: str, site: Path, output: Path) -> int:
    """Run the campaign's parts on the CPU; return its exit code."""
    words = [python, "-m", "benchmarks.gpu_campaign", "--device", "cpu", "--output", str(output)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    return subprocess.run(isolated(words), cwd=ROOT, env=env, check=False).returncode


def main() -> None:
    """Build the environment, and rehearse in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="", help="a Python 3.12 (default: found)")
    parser.add_argument("--uv", default=shutil.which("uv") or "uv", help="uv's program")
    parser.add_argument("--environment", type=Path, default=ROOT / ".gpu-venv")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-rehearsal")
    chosen = parser.parse_args()
    folder = chosen.environment.absolute()
    build(folder, find_python(chosen.python), chosen.uv)
    python = str(folder / "bin" / "python")
    site = folder / "site"
    rehearsed = campaign(python, site, chosen.output.absolute())
    tested = run_tests(python, [ROOT], WITHOUT_RAY)
    tested_with_wheels = run_tests(python, [ROOT, site], WITH_WHEELS)
    sys.exit(int(any((rehearsed, tested, tested_with_wheels))))


if __name__ == "__main__":
    main()
