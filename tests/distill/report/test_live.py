"""The page of a run in a browser of this machine: current, read-only, and for the holder of its address alone."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest

from distill.report import live
from distill.report.live import LivePage, open_page
from distill.report.page import TITLES
from distill.runfolder.status import StatusFile
from tests.distill.report.test_page import Elements, write_hostile_run
from tests.support.browser import BROWSER, browsing
from tests.support.command import Run
from tests.support.run_folders import write_run
from tests.support.status import STATUS


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LivePage]:
    monkeypatch.setattr(live, "LOOK_S", 0.02)
    found = open_page(write_run(tmp_path / "mine", state="training"))
    thread = threading.Thread(target=found.serve, daemon=True)
    thread.start()
    yield found
    found.stop()
    thread.join(60.0)
    assert not thread.is_alive()


def get(
    page: LivePage, path: str, host: str = "", verb: str = "GET"
) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", page.port, timeout=60.0)
    connection.request(verb, path, headers={"Host": host or f"127.0.0.1:{page.port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def test_page__has_the_sections_and_headers_that_shut_others_out(page: LivePage) -> None:
    status, text, headers = get(page, page.source.prefix)
    assert status == 200 and headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY" and headers["Referrer-Policy"] == "no-referrer"
    found = Elements(text)
    assert [each["id"] for each in found.named("section")] == list(TITLES)
    (policy,) = [m["content"] for m in found.named("meta") if m.get("http-equiv")]
    assert "connect-src 'self'" in str(policy) and "EventSource" in found.script
    status, body, _ = get(page, f"{page.source.prefix}body")
    assert status == 200 and "State: training" in body and "<script" not in body
    status, _, _ = get(page, page.source.prefix, host=f"localhost:{page.port}")
    assert status == 200


def test_page__is_refused_without_its_token_or_under_another_host(page: LivePage) -> None:
    prefix = page.source.prefix
    assert len(prefix) > 30 and page.address.endswith(prefix)
    wrong = "/" + "x" * (len(prefix) - 2) + "/"
    for path in (
        "/",
        "/body",
        wrong,
        wrong + "body",
        prefix[:-1],
        f"{prefix}../job.json",
        f"{prefix}x",
    ):
        assert get(page, path)[0] == 404, path
    for host in (
        "evil.example",
        f"evil.example:{page.port}",
        "127.0.0.1",
        f"127.0.0.1:{page.port}.x",
    ):
        status, text, _ = get(page, prefix, host=host)
        assert (status, text) == (403, "wrong host"), host
    for verb in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert get(page, prefix, verb=verb)[0] == 501, verb


def test_page__listens_on_loopback_alone(page: LivePage) -> None:
    assert page.server.socket.getsockname()[0] == "127.0.0.1"
    other = open_page(page.source.run_folder)
    other.server.server_close()
    assert other.source.prefix != page.source.prefix


def test_events__follow_the_files_and_change_none(page: LivePage) -> None:
    run = page.source.run_folder
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    connection = HTTPConnection("127.0.0.1", page.port, timeout=60.0)
    connection.request("GET", f"{page.source.prefix}events")
    answer = connection.getresponse()
    assert answer.getheader("Content-Type", "").startswith("text/event-stream")
    get(page, page.source.prefix)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == files
    done = threading.Event()

    def change() -> None:  # again and again: the first may come before the server has looked
        for step in range(1000):
            StatusFile(run).write(replace(STATUS, step=step, message=f"news {step}"))
            if done.wait(0.05):
                return

    writer = threading.Thread(target=change)
    writer.start()
    assert answer.readline() == b"data: changed\n"
    done.set()
    writer.join()
    connection.close()
    assert "news " in get(page, f"{page.source.prefix}body")[1]


def test_events__are_for_a_few_browsers(page: LivePage) -> None:
    opened = []
    for _ in range(live.MOST_LISTENERS):
        connection = socket.create_connection(("127.0.0.1", page.port), timeout=60.0)
        connection.sendall(
            f"GET {page.source.prefix}events HTTP/1.0\r\nHost: localhost:{page.port}\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.0 200")
        opened.append(connection)
    assert get(page, f"{page.source.prefix}events")[0] == 503
    for connection in opened:
        connection.close()


def test_watch__web_names_a_port_that_is_taken(tmp_path: Path, distill: Run) -> None:
    run = write_run(tmp_path / "mine")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = distill("watch", str(run), "--web", "--port", port)
    assert ended.code == 3 and f"--port {port}: 127.0.0.1 cannot listen" in ended.err


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_browser__shows_news_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "LOOK_S", 0.02)
    run = write_hostile_run(tmp_path / "mine")
    page = open_page(run)
    serving = threading.Thread(target=page.serve, daemon=True)
    serving.start()
    news = "new <script>document.title='ran'</script>"
    with browsing(tmp_path / "profile") as tab:
        tab.open(page.address)
        assert tab.value("document.querySelectorAll('section').length") == len(TITLES)
        for count in range(600):  # the first may come before the browser listens
            StatusFile(run).write(replace(STATUS, message=f"{news} {count}"))
            if "new <script>" in tab.value("document.getElementById('summary').textContent"):
                break
            tab.value("new Promise((done) => setTimeout(done, 100))")
        assert count < 599
        assert tab.value("document.title").endswith(" - distill")
        assert tab.complaints() == []
        assert {url.partition("?")[0] for url in tab.requests()} <= {
            page.address,
            f"{page.address}body",
            f"{page.address}events",
        }
    page.stop()
    serving.join(60.0)
