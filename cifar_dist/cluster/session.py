"""The connection to Ray, and the folder that its nodes share."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cifar_dist.cluster import ray_internals
from cifar_dist.errors import Interrupted, UserError, first_line
from cifar_dist.storage import AnyPath, StorePath
from cifar_dist.variables import variables_restored

CONNECT_TIMEOUT_S = 5
LOOK_TIMEOUT_S = 60
"""How long nodes may take to report whether they see a folder."""


_STARTING = ("", "local")
"""Values of ``RAY_ADDRESS`` with which Ray may start a cluster on this machine."""
_OWN = "cifar_dist-"
"""Beginning of the names of folders that are made for Ray, one for each user."""
# A socket's path has at most 107 bytes. Ray's are ray/session_DATE_TIME_PID/sockets/plasma_store.
_LONGEST = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


@contextmanager
def session(verbose: bool = False) -> Iterator[str]:
    """Connect to Ray; yields where to, formatted for display.

    An existing connection of this process is used and kept. Else the cluster that ``RAY_ADDRESS``
    names, or the one that was started on this machine, is joined; where there is none, one is
    started for as long as this lasts.

    Args:
        verbose: pass on what Ray and its workers print.

    Raises:
        UserError: the cluster that ``RAY_ADDRESS`` names cannot be reached, or wants another token.
    """
    if ray.is_initialized():
        yield "the Ray session of this process"
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if _check_answering(address):
        use_token()
        _check_token(address)
    # Without the dashboard a cluster of this machine starts in less time and memory. Joining
    # one ignores the option. With --verbose, Ray's clean-up actor would complain of its absence.
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _in_usable_folder(address), ray_internals.lean_cluster(log_monitor=not verbose):
            ray.init(
                include_dashboard=verbose,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except AuthenticationError:
        raise _other_token(address) from None
    except (UserError, Interrupted):
        raise
    except Exception as error:  # also of that very type: "The current node timed out"
        if AuthenticationError.__name__ in str(error):  # Ray wraps its traceback
            raise _other_token(address) from None
        if address in _STARTING:
            raise UserError(
                f"Ray cannot be started on this machine ({first_line(error)}); its files are in "
                "the folder that RAY_TMPDIR names, else TMPDIR or /tmp"
            ) from None
        raise _not_answering(address, error) from None
    # Ray replaces the handler of SIGTERM by one that exits at once, without a checkpoint. In other
    # threads than the main one it does not, and Python would refuse to set it back.
    if threading.current_thread() is threading.main_thread():
        for each, handler in handlers.items():
            signal.signal(each, handler)
    if not verbose:
        for name in ("ray", "ray.train", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        nodes = sum(node["Alive"] for node in ray.nodes())
        yield f"Ray, {nodes} node{'s' * (nodes > 1)}"
    finally:
        # In this order: a thread that calls Ray after a shutdown, and before this, would start a
        # cluster that nobody ends.
        ray_internals.forbid_auto_connect()
        ray.shutdown()


@contextmanager
def _in_usable_folder(address: str) -> Iterator[None]:
    """While this lasts Ray starts a cluster in a folder that it can use.

    Raises:
        UserError: there is none, or the one that ``RAY_TMPDIR`` names cannot be used.
    """
    name = "RAY_TMPDIR"
    if address not in _STARTING:
        yield
    elif given := os.environ.get(name):
        if problem := _problem(Path(given)):
            raise UserError(f"{name} {given}: {problem}; name another folder")
        yield
    else:
        usual = Path(os.environ.get("TMPDIR") or "/tmp")
        mine = f"{_OWN}{os.getuid()}"
        folders = (usual, Path("/tmp"), Path("/tmp", mine), Path("/var/tmp", mine))
        found = next((each for each in folders if not _problem(each)), None)
        if found is None:
            raise UserError(
                f"TMPDIR {usual}: {_problem(usual)}; set {name} to a folder of at most "
                f"{_LONGEST} characters"
            )
        with variables_restored(name):
            if found != usual:
                os.environ[name] = str(found)
            yield


def _problem(folder: Path) -> str | None:
    """Return why Ray could not keep its files and sockets in a folder, if so."""
    if (length := len(os.fsencode(folder))) > _LONGEST:
        return f"has {length} characters, and Ray's sockets allow for at most {_LONGEST}"
    if not folder.is_absolute():  # Ray's processes would wait for each other until they give up
        return "is no absolute path"
    rays = folder / "ray"
    for each in (rays, rays / "ray_current_cluster"):
        # Of another user's, who has made it for themselves.
        if os.path.lexists(each) and not os.access(each, os.R_OK | os.W_OK):
            return f"its {each.relative_to(folder)} is another user's"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    if folder.name.startswith(_OWN) and folder.stat().st_uid != os.getuid():
        return "is another user's"  # who could read what is sent through the sockets
    return None if os.access(rays if rays.exists() else folder, os.W_OK) else "cannot be written"


def use_token() -> None:
    """Switch to token authentication where there is a token and nothing says otherwise."""
    ray_internals.use_token()


def _check_token(address: str) -> None:
    """Check that a cluster takes this process's token.

    Raises:
        UserError: it does not.
    """
    try:
        with _silent_libraries():
            ray_internals.try_token(address)
    except AuthenticationError:
        raise _other_token(address) from None
    except (ConnectionError, RuntimeError, ray.exceptions.RayError):
        return  # `ray.init` tries again, and reports it


def _other_token(address: str) -> UserError:
    return UserError(f"RAY_ADDRESS {address}: {token_advice()}")


def token_advice() -> str:
    """Return what to do where a cluster refuses this process's token, or its having none."""
    token = find_token()
    if token and not ray_internals.enabled() and "RAY_AUTH_MODE" not in os.environ:
        return f"the cluster wants a token; to use that of {token} set RAY_AUTH_MODE=token"
    if token:
        return f"the cluster wants another token than that of {token}"
    return (
        "the cluster wants a token; put it into RAY_AUTH_TOKEN, or into a file and its name into "
        "RAY_AUTH_TOKEN_PATH"
    )


def find_token() -> str | None:
    """Return where this machine's token for Ray clusters is, in the order in which Ray looks."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return f"RAY_AUTH_TOKEN_PATH {path}" if Path(path).is_file() else None
    # Not `Path.home`, which raises where there is no home directory.
    default = Path(os.path.expanduser("~/.ray/auth_token"))
    return str(default) if default.is_file() else None


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Silence standard error while this lasts, that of C++ included."""
    sys.stderr.flush()
    # The descriptor is replaced, not `sys.stderr`: Ray's C++ client writes past Python's object.
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_answering(address: str) -> bool:
    """Check that something listens at a ``HOST:PORT``; Ray itself would try for minutes.

    Returns:
        Whether that is what the address is, and not "local", "auto" or nothing.

    Raises:
        UserError: nothing listens.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return False
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _not_answering(address, error) from None
    return not address.startswith("ray://")


def _not_answering(address: str, error: Exception) -> UserError:
    return UserError(
        f"RAY_ADDRESS {address}: no Ray cluster answers ({first_line(error)}); "
        "start one with 'ray start --head', or unset RAY_ADDRESS"
    )


def check_shared(folder: AnyPath) -> None:
    """Check that all nodes of the cluster see a run's folder.

    Args:
        folder: exists on this node.

    Raises:
        UserError: one of them does not.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    others = [each for each in nodes if each != ray.get_runtime_context().get_node_id()]
    if isinstance(folder, StorePath) or not others:
        return
    # A new file, since a folder of that name may exist on each node and yet not be shared.
    mark = folder / f".seen-{uuid.uuid4().hex[:8]}.tmp"
    mark.touch()
    try:
        # No CPU, so that the check also runs on nodes that are full.
        look = ray.remote(num_cpus=0)(_is_file)
        asked = {
            look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(str(mark)): nodes[node]
            for node in others
        }
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_TIMEOUT_S)
        for answer in answered:
            with contextlib.suppress(ray.exceptions.RayError):  # a node that has gone meanwhile
                if not ray.get(answer):
                    raise UserError(
                        f"--storage-path {folder.parent}: node {asked[answer]} does not see it; "
                        "name a folder that all nodes share, or an object store (s3://...)"
                    )
    finally:
        mark.unlink(missing_ok=True)


def _is_file(path: str) -> bool:
    return os.path.isfile(path)


def ray_storage(folder: AnyPath) -> dict[str, Any]:
    """Return a folder as Ray's ``RunConfig`` takes it."""
    if isinstance(folder, StorePath):
        return {"storage_path": folder.key, "storage_filesystem": folder.filesystem}
    return {"storage_path": str(folder)}
