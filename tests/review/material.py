"""What the tests of the review page share."""

import os
from typing import Any

from starlette.testclient import TestClient

TOKEN, PORT = "s3cret", 8123
BASE = f"http://127.0.0.1:{PORT}"
MARKUP = "<img src=x onerror=alert(1)>.png"
ODD = os.fsdecode(b"caf\xe9.png")


def decide(client: TestClient, id_: int, choice: str, version: int) -> Any:
    return client.post(f"/{TOKEN}/decide", json={"changes": [{"id": id_, "decision": choice, "version": version}]})
