"""A cluster's job server: the addresses that may be contacted, and the token for it."""

from __future__ import annotations

import ipaddress
import logging
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cifar_dist.errors import UserError, first_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONNECT_TIMEOUT_S = 5


def check_address(address: str, insecure: bool) -> None:
    """Check that a job server can be contacted without strangers reading along.

    Args:
        address: ``http://HOST:PORT`` or ``https://HOST:PORT``.
        insecure: whether plain http may go over public networks.

    Raises:
        UserError: it is no such address, nothing answers there, or it is plain http to a host that
            is neither this one nor on a private network.
    """
    given = f"--address {address}"
    try:
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 8265)
    except ValueError as error:
        raise UserError(f"{given}: {error}; give http://HOST:8265") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{given}: is no address of a job server; give http://HOST:8265")
    if parts.username or parts.password:
        raise UserError("--address: holds a password, which would be shown; omit it")
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"{given}: {parts.hostname} is not known ({error.strerror})") from None
    # All of a name's addresses must be private: the client may use any of them.
    hosts = [ipaddress.ip_address(str(each[4][0]).split("%")[0]) for each in found]
    # A job is code that the cluster runs, and the token lets anybody run more: read or changed on
    # the way, it gives the cluster away.
    if parts.scheme == "http" and not insecure and not all(host.is_private for host in hosts):
        raise UserError(
            f"{given}: plain http over a public network shows the token and lets others change the "
            "job; give an https address, tunnel it (ssh -L 8265:localhost:8265 HEAD), or add "
            "--insecure"
        )
    try:
        socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"{given}: nothing answers ({error}); check that the cluster runs, with its dashboard "
            "(ray start --head), and that this is the dashboard's port"
        ) from None


def connect(address: str, insecure: bool = False) -> JobSubmissionClient:
    """Return a client of a cluster's job server, with this machine's token where there is one.

    Raises:
        UserError: it cannot be contacted, or wants another token.
    """
    # Before Ray is imported, so that a refusal is immediate.
    check_address(address, insecure)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    from cifar_dist.cluster.session import token_advice, use_token

    # They would log each .gitignore that they read, between the lines of the job's own output.
    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk",
                 "_private.runtime_env"):  # fmt: skip
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    use_token()  # the client does not by itself
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(f"--address {address}: {token_advice()}") from None
    except (ConnectionError, RuntimeError, OSError) as error:
        said = first_line(error)
        raise UserError(f"--address {address}: is no job server of Ray ({said})") from None
