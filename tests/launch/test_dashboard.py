"""Which addresses jobs are sent to."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cifar_dist.errors import UserError
from launch.dashboard import check_address


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_this_machine_is_spoken_to(listening: int, scheme: str) -> None:
    check_address(f"{scheme}://127.0.0.1:{listening}", insecure=False)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:8265", "is no address of a job server"),
        ("ray://127.0.0.1:10001", "is no address of a job server"),
        ("http://", "is no address of a job server"),
        ("http://127.0.0.1:99999", "Port out of range"),
        ("http://me:secret@127.0.0.1:8265", "holds a password"),
        ("http://8.8.8.8:8265", "add --insecure"),
        ("http://[2001:4860:4860::8888]:8265", "add --insecure"),
        ("http://no.such.host.invalid:8265", "is not known"),
    ],
)
def test_others_are_refused(address: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        check_address(address, insecure=False)
    assert "secret" not in str(refused.value)


def test_a_port_where_nothing_listens_is_refused(listening: int) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match="nothing answers"):
        check_address(f"http://127.0.0.1:{port}", insecure=False)
