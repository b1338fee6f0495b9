"""What every server here does alike: listen, and answer until it is interrupted."""

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, int]]:
    """A socket that listens, and its port; who comes before the first answer waits instead of being refused.

    Args:
        host: Address to listen at.
        port: 0 takes a free one.

    Raises:
        OSError: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends answers without delay only where the protocol is named; else each waits 40 ms for the client's ACK
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        yield listener, listener.getsockname()[1]


def make_server(app: ASGIApp, *, patience: int) -> uvicorn.Server:
    """A server of an app that says nothing of its own.

    Args:
        app: Answers.
        patience: Seconds for which requests that have begun are waited for at the end.
    """
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=patience,
    )
    return uvicorn.Server(config)
