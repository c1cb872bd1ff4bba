"""``distill watch --web``: the page of a run while it trains, for a browser on this machine.

    GET /TOKEN/        the page
    GET /TOKEN/body    its sections as they are now
    GET /TOKEN/events  server-sent events: a line whenever the files of the run changed

Nothing else is answered, and nothing is written. It listens on loopback only. Another user of the machine can
connect too, so the address has a random token; a web page of somebody else could have its name resolve to loopback,
so the Host header has to be this address.
"""

import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from distill.report.looks import LIVE_SCRIPT, SCRIPT
from distill.report.page import document, make_body
from distill.report.run_record import read_run
from distill.runfolder.progress import FILE as PROGRESS

LOOPBACK = "127.0.0.1"
TOKEN_BYTES = 24
LOOK_S = 2.0  # between two looks at the files
ALIVE_S = (
    15.0  # between two comments to a browser, without which a closed one would never be noticed
)
MOST_LISTENERS = 8  # browsers at once: each holds a thread
WATCHED = ("status.json", "summary.json", "events.jsonl", "features.png", "metrics", PROGRESS)
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Source:
    """The run of a page, and who may read it."""

    run_folder: Path
    has_pictures: bool
    prefix: str  # of every path: the token between slashes
    listeners: threading.Semaphore
    ended: threading.Event

    def body(self) -> str:
        """The sections as they are now."""
        return make_body([read_run(self.run_folder)], has_pictures=self.has_pictures).text

    def page(self) -> str:
        """The page with the script that renews it."""
        run = read_run(self.run_folder)
        body = make_body([run], has_pictures=self.has_pictures)
        return document(run.name, body, SCRIPT + LIVE_SCRIPT, connects="'self'")


@dataclass(frozen=True)
class LivePage:
    """A server of one run; ``address`` is what to open."""

    server: ThreadingHTTPServer
    source: Source

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.socket.getsockname()[1])

    @property
    def address(self) -> str:
        """What to open, token included."""
        return f"http://{LOOPBACK}:{self.port}{self.source.prefix}"

    def serve(self) -> None:
        """Answers until ``stop``."""
        self.server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """Ends ``serve`` from another thread, and every answer that is still open."""
        self.source.ended.set()
        self.server.shutdown()
        self.server.server_close()


def open_page(run_folder: Path, *, port: int = 0, has_pictures: bool = True) -> LivePage:
    """Binds a port of loopback; 0 lets the system choose one.

    Raises:
        OSError: the port is taken.
    """
    source = Source(
        run_folder,
        has_pictures,
        f"/{secrets.token_urlsafe(TOKEN_BYTES)}/",
        threading.Semaphore(MOST_LISTENERS),
        threading.Event(),
    )
    return LivePage(ThreadingHTTPServer((LOOPBACK, port), partial(_Handler, source)), source)


def marks_of(run_folder: Path) -> str:
    """A text that changes with the files of a run."""
    found = []
    for name in WATCHED:
        path = run_folder / name
        for each in sorted(path.iterdir()) if path.is_dir() else [path]:
            with suppress(OSError):
                facts = each.stat()
                found.append(f"{each.name} {facts.st_mtime_ns} {facts.st_size}")
    return "\n".join(found)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET of three paths with the right token and Host."""

    timeout = 30.0  # for a request to arrive
    server_version, sys_version = "distill", ""

    def __init__(self, source: Source, *arguments: Any) -> None:
        """Answers at once: the base class does so when it is made."""
        self._source = source
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answers a request, or refuses it without a word about what is there."""
        port, prefix = self.connection.getsockname()[1], self._source.prefix
        if self.headers.get("Host") not in {f"{LOOPBACK}:{port}", f"localhost:{port}"}:
            return self._send(HTTPStatus.FORBIDDEN, "wrong host", "text/plain")
        start, path = self.path[: len(prefix)], self.path[len(prefix) :]
        if not secrets.compare_digest(start.encode(), prefix.encode()):
            return self._send(HTTPStatus.NOT_FOUND, "not found", "text/plain")
        if path == "":
            return self._send(HTTPStatus.OK, self._source.page(), "text/html")
        if path == "body":
            return self._send(HTTPStatus.OK, self._source.body(), "text/html")
        if path == "events":
            return self._listen()
        return self._send(HTTPStatus.NOT_FOUND, "not found", "text/plain")

    def _send(self, status: HTTPStatus, text: str, kind: str) -> None:
        data = text.encode()
        self._begin(status, kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(data)

    def _begin(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        for name, value in HEADERS.items():
            self.send_header(name, value)

    def _listen(self) -> None:
        """Writes an event at each change until the browser is gone."""
        if not self._source.listeners.acquire(blocking=False):
            return self._send(HTTPStatus.SERVICE_UNAVAILABLE, "too many", "text/plain")
        try:
            self._begin(HTTPStatus.OK, "text/event-stream")
            self.end_headers()
            before, quiet_s = marks_of(self._source.run_folder), 0.0
            while True:
                if self._source.ended.wait(LOOK_S):
                    return None
                now, quiet_s = marks_of(self._source.run_folder), quiet_s + LOOK_S
                if now != before or quiet_s >= ALIVE_S:
                    self.wfile.write(b"data: changed\n\n" if now != before else b": alive\n\n")
                    before, quiet_s = now, 0.0
        except OSError:  # the browser is gone
            return None
        finally:
            self._source.listeners.release()

    def log_message(self, format: str, *arguments: object) -> None:
        """Prints nothing: the address holds the token."""
