"""``python -m launch.submit``: run ``train``, ``tune`` or ``evaluate`` on a Ray cluster.

    python -m launch.submit --address http://HEAD:8265 -- train --num-workers 16 --use-gpu \\
        --storage-path /shared/runs

sends this folder's code to the cluster (in a git checkout what git tracks and what is new; never
secrets, data or results), with the versions that it depends on, and shows the job's output until
it ends. The exit code is the job's. Ctrl-C asks the job to save a checkpoint and stop; a second one
leaves it running.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.cli import parse_evaluate, parse_train, parse_tune
from cifar_dist.errors import Interrupted, RunFailed, UserError, first_line
from cifar_dist.exits import run_command
from launch.dashboard import connect
from launch.shipment import job_package, runtime_env

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

COMMAND = "python -m launch.submit"
COMMANDS = ("train", "tune", "evaluate")
POLL_S = 0.2
LOOK_S = 1.0
RECONNECTIONS = 5
AGENT_TIMEOUT_S = 60


def main(words: list[str]) -> None:
    """Parse, do, and print the results."""
    chosen = _parse(words)
    try:
        _do(chosen, chosen.address)
    except (UserError, RunFailed):
        raise
    except (RuntimeError, OSError) as error:
        raise RunFailed(
            f"--address {chosen.address}: the cluster no longer answers ({first_line(error)})"
        ) from None


def _do(chosen: argparse.Namespace, address: str) -> None:
    if chosen.list:
        _list(connect(address, chosen.insecure))
    elif chosen.stop:
        client = connect(address, chosen.insecure)
        _known(client, chosen.stop)
        client.stop_job(chosen.stop)
        print(f"asked {chosen.stop} to stop; {_to_follow(address, chosen.stop)}")
    elif chosen.follow:
        client = connect(address, chosen.insecure)
        _known(client, chosen.follow)
        _leave_with(follow(client, address, chosen.follow))
    else:
        entrypoint = _entrypoint(chosen.command)
        package = job_package(Path.cwd(), chosen.command)
        client = connect(address, chosen.insecure)
        tool = None if chosen.image_has_it else chosen.install_with
        # To standard error: the first line of the output names the job.
        print(*package.lines(), sep="\n", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder) / "package.zip"
            package.write(packed)
            job = _send(client, address, entrypoint, runtime_env(packed, tool))
        print(f"job {job}; {_to_follow(address, job)}", flush=True)
        if not chosen.no_wait:
            _leave_with(follow(client, address, job))


def _send(client: JobSubmissionClient, address: str, entrypoint: str, env: dict[str, Any]) -> str:
    """Have the cluster take a job.

    Returns:
        Its id.

    Raises:
        UserError: it does not.
    """
    until = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=env))
        except (RuntimeError, ValueError) as error:
            first = first_line(error)
            # A cluster that has only just started answers before it takes jobs.
            if "No available agent" in first and time.monotonic() < until:
                time.sleep(LOOK_S)
                continue
            raise UserError(f"--address {address}: the job was not taken: {first}") from None


def follow(client: JobSubmissionClient, address: str, job: str) -> int:
    """Print a job's output until it ends.

    Returns:
        Its exit code; 130 where it was stopped.

    Raises:
        Interrupted: by a second SIGINT or SIGTERM; the job runs on.
        RunFailed: the cluster no longer answers.
    """
    from cifar_dist.cluster.threads import InThread

    # In a thread, so that this one only waits, and acts on a signal at once.
    output = InThread(lambda: asyncio.run(_print_output(client, job)))
    with _interruptions() as count:
        asked = False
        while output.alive:
            if count() and not asked:
                asked = True
                client.stop_job(job)
                print("asked the job to save and stop; once more to leave it running", flush=True)
            if count() > 1:
                raise Interrupted(f"{job} runs on; {_to_follow(address, job)}")
            output.join(POLL_S)
    if output.error is not None:
        raise RunFailed(
            f"the cluster no longer answers ({first_line(output.error)}); "
            f"{_to_follow(address, job)}"
        )
    info = client.get_job_info(job)
    # The output may end before the job's state does.
    while not info.status.is_terminal():
        time.sleep(LOOK_S)
        info = client.get_job_info(job)
    if info.status == "STOPPED":
        return 130
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:  # it never began, and printed nothing
        print(info.message or "the job failed", file=sys.stderr)
    return info.driver_exit_code or 1


async def _print_output(client: JobSubmissionClient, job: str) -> None:
    """Print a job's output as it comes, and resume it where a lost connection broke off."""
    shown = 0
    for attempt in range(RECONNECTIONS):
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                # A new connection sends the output from its beginning: what is shown already is
                # skipped.
                new = text[max(shown - seen, 0) :]
                seen += len(text)
                shown = max(shown, seen)
                print(new, end="", flush=True)
            return
        except (OSError, RuntimeError):
            if attempt + 1 == RECONNECTIONS:
                raise
            await asyncio.sleep(2**attempt)


@contextlib.contextmanager
def _interruptions() -> Iterator[Any]:
    """Only count signals while this lasts; yields a function that returns their number."""
    seen: list[int] = []
    # Counted and not raised: an error in the middle of a request would leave open whether the job
    # was asked to stop.
    before = {
        each: signal.signal(each, lambda number, frame: seen.append(number))
        for each in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: len(seen)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _entrypoint(command: list[str]) -> str:
    """Return the command line of a job.

    Raises:
        UserError: it could not run there, or would leave its results where nobody finds them.
    """
    if not command or command[0] not in COMMANDS:
        names = ", ".join(COMMANDS)
        given = command[0] if command else "nothing"
        raise UserError(f"{given}: is no command to submit; write '-- COMMAND ...' with {names}")
    # Parsed here too, by the command's own parser: a misspelt flag is refused at once, and not by a
    # job minutes later.
    name, *words = command
    if name == "evaluate":
        given = path = parse_evaluate(words).model
    else:
        path = _storage_path(name, words)
        given = f"--storage-path {path}"
    if not Path(path).is_absolute() and "://" not in path:
        raise UserError(
            f"{given}: a job runs in a temporary folder of the cluster, where nothing is and "
            "nothing stays; give an absolute path that all of its nodes share"
        )
    return shlex.join(["python", "-m", f"cifar_dist.{name}", *words])


def _storage_path(name: str, words: list[str]) -> str:
    """Return the folder of a command's results; its other words are checked on the way."""
    if "--resume" in words:  # its settings are where it was started
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--storage-path", default="runs")
        return str(parser.parse_known_args(words)[0].storage_path)
    config = parse_tune(words).train if name == "tune" else parse_train(words)
    return config.storage_path


def _list(client: JobSubmissionClient) -> None:
    jobs = [job for job in client.list_jobs() if job.submission_id]
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))
        print(f"{job.submission_id}  {job.status.value:<9}  {started}  {job.entrypoint}")
    if not jobs:
        print("no jobs")


def _known(client: JobSubmissionClient, job: str) -> None:
    """Check that a job is there.

    Raises:
        UserError: it is not.
    """
    try:
        client.get_job_info(job)
    except RuntimeError:
        raise UserError(f"{job}: the cluster knows no such job; see --list") from None


def _to_follow(address: str, job: str) -> str:
    return f"to follow it: {shlex.join([*COMMAND.split(), '--address', address, '--follow', job])}"


def _leave_with(code: int) -> None:
    if code:
        sys.exit(code)


def _parse(words: list[str]) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            # argparse itself would print its usage of many lines.
            raise UserError(f"{message}; see {COMMAND} --help")

    parser = Parser(
        prog=COMMAND, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--address", required=True, metavar="URL", help="http://HEAD:8265")
    parser.add_argument("--insecure", action="store_true",
                        help="allow plain http to a host on a public network")  # fmt: skip
    parser.add_argument("--install-with", choices=("uv", "pip"), default="uv",
                        help="what installs the dependencies on the nodes")  # fmt: skip
    parser.add_argument("--image-has-it", action="store_true",
                        help="the nodes have the dependencies")  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--no-wait", action="store_true", help="leave when the job is sent")
    what.add_argument("--follow", metavar="ID", help="show a job's output")
    what.add_argument("--stop", metavar="ID", help="have a job save a checkpoint and stop")
    what.add_argument("--list", action="store_true", help="show the cluster's jobs")
    mine, command = (
        (words[: words.index("--")], words[words.index("--") + 1 :])
        if "--" in words
        else (words, [])
    )
    chosen = parser.parse_args(mine)
    chosen.command = command
    return chosen


if __name__ == "__main__":
    run_command(main)
