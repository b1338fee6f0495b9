"""Results to another program over HTTP: the file of results is the queue, so that none is lost while it is away."""

import contextlib
import hashlib
import json
import logging
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from email.message import Message
from typing import IO

from flawsift.deploy.results import ResultsFile, Row
from flawsift.errors import FlawsiftError, ParameterError, one_line
from flawsift.files import write_text

log = logging.getLogger("flawsift")

TIMEOUT = 10.0  # seconds that one answer is waited for
PAUSES = (1.0, 5.0, 15.0, 60.0)  # seconds before the next try; the last one is kept
Post = Callable[[bytes, str], None]


class Webhook:
    """Sends each row of a file of results as JSON by POST, one after another, in a thread of its own.

    How far it came is kept beside the file. A row is done once the receiver has answered with 2xx; a program that is
    killed in between sends it again, under the same Idempotency-Key.
    """

    def __init__(self, url: str, results: ResultsFile, *, post: Post | None = None) -> None:
        """Go on where an earlier run stopped; rows from before a first run are not sent.

        Args:
            url: http or https.
            results: Of the watch that writes them, whose file is there.
            post: Sends a body under a key, or raises OSError; None sends it to the URL.

        Raises:
            ParameterError: The URL is none.
            OutputError: The file for how far it came cannot be written.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ParameterError("The webhook must be an address such as https://host/path.")
        self.host = parts.hostname  # the rest of an address may be a secret
        self._post = post or (lambda body, key: _post(url, body, key))
        self._results = results
        self._place = results.path.with_name(f"{results.path.name}.sent")
        if not self._place.exists():
            write_text(self._place, f"{results.path.stat().st_size}\n")
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def notify(self) -> None:
        """Tell that there are new rows."""
        self._wake.set()

    def stop(self) -> int:
        """Send what can be sent at once, end, and say how many rows are left for the next run."""
        self._stopped.set()
        self._wake.set()
        self._thread.join(TIMEOUT + 1)
        with contextlib.suppress(FileNotFoundError):  # somebody took the file away
            return sum(1 for _ in self._results.rows(self._sent()))
        return 0

    def _sent(self) -> int:
        """How many bytes of the file are done."""
        try:
            done = int(self._place.read_text("utf-8"))
        except (ValueError, FileNotFoundError):  # nothing of ours: rather twice than never
            return 0
        return done if done <= self._results.path.stat().st_size else 0  # the file was begun anew

    def _run(self) -> None:
        n_failed = 0
        while True:
            self._wake.clear()
            try:
                for row, end in self._results.rows(self._sent()):
                    self._send(row)
                    write_text(self._place, f"{end}\n")
                    if n_failed:
                        log.warning("The webhook at %s answers again.", self.host)
                    n_failed = 0
            except (OSError, FlawsiftError) as error:
                if not n_failed:
                    log.warning(
                        "A result did not reach the webhook at %s: %s. It is sent again until it does.",
                        self.host,
                        one_line(error),
                    )
                n_failed += 1
            if self._stopped.is_set():
                return
            if n_failed:
                self._stopped.wait(PAUSES[min(n_failed, len(PAUSES)) - 1])
            else:
                self._wake.wait()

    def _send(self, row: Row) -> None:
        key = hashlib.sha256("\0".join(map(str, (*row.key, row.time))).encode("utf-8", "backslashreplace"))
        self._post(json.dumps(asdict(row)).encode(), key.hexdigest())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The library follows a redirect of a POST by a GET without its body, which would look like a success."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _post(url: str, body: bytes, key: str) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    request = urllib.request.Request(url, body, headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=TIMEOUT) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"it answered {error.code}") from error
    except OSError:
        raise
    except Exception as error:  # what an answer that is no HTTP raises is not one kind
        raise OSError(one_line(error)) from error
