"""What a list of addresses may ask for: public addresses, by http, answers of some size within some time."""

import io
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from dedup import download

LATE = threading.Event()  # the server that says nothing is let go when the tests end


@cache
def picture(seed: int, side: int = 96) -> bytes:
    """PNG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


class Site(BaseHTTPRequestHandler):
    """What servers do: answer, late, never, with something else, elsewhere, without end."""

    asked: list[str] = []  # noqa: RUF012 - the class is all that the tests hold

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        Site.asked.append(name)
        if name == "never":
            LATE.wait(30)
            return
        if name == "late":
            time.sleep(0.5)
        if name == "drip":
            self.send_response(200)
            self.end_headers()
            while not LATE.wait(0.05):
                self.wfile.write(b"x")
            return
        if name == "gone":
            self.send_error(404)
        elif name in ("moved", "loop", "secret", "file"):
            places = {"moved": "/1", "loop": "/loop", "secret": "http://169.254.169.254/", "file": "file:///etc/passwd"}
            self.send_response(302)
            self.send_header("Location", places[name])
            self.end_headers()
        else:
            self.answer(name)

    def answer(self, name: str) -> None:
        data = {"broken": b"<html>no image</html>", "huge": picture(7, 1200), "empty": b""}.get(name)
        data = picture(int(name) if name.isdigit() else 3) if data is None else data
        self.send_response(200)
        if name == "noai":
            self.send_header("X-Robots-Tag", "noai")
        self.send_header("Content-Length", str(len(data) + 100 * (name == "short")))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve() -> Iterator[str]:
    """The address of such a server."""
    LATE.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        LATE.set()
        server.shutdown()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with serve() as address:
        yield address


def ask(address: str, timeout: float = 5) -> bytes:
    with download.make_opener().open(urllib.request.Request(address), timeout=timeout) as answer:
        return answer.read()


def test_private_addresses_are_refused(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in the list, those that a name stands for, and those that a server leads to."""
    port = site.rpartition(":")[2]
    asked = len(Site.asked)
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433", "169.254.169.254"):
        with pytest.raises(OSError, match="is inside this machine or network: refused"):
            ask(f"http://{host}:{port}/0")
    assert len(Site.asked) == asked
    monkeypatch.setattr(download, "is_public", lambda place: place == "127.0.0.1")
    assert ask(f"{site}/moved") == picture(1)
    with pytest.raises(OSError, match=r"169\.254\.169\.254 .* is inside .* refused"):
        ask(f"{site}/secret")
    monkeypatch.undo()
    monkeypatch.setenv(download.PRIVATE, "1")
    assert ask(f"{site}/0") == picture(0)


@pytest.mark.parametrize(
    "place", ["10.0.0.1", "100.64.0.1", "fe80::1%eth0", "fc00::1", "::", "224.0.0.1", "192.168.1.1"]
)
def test_addresses_that_are_not_public(place: str) -> None:
    assert not download.is_public(place)


@pytest.mark.parametrize("place", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(place: str) -> None:
    assert download.is_public(place)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA"])
def test_other_schemes_are_unknown(address: str) -> None:
    with pytest.raises(OSError, match="unknown url type"):
        ask(address)


def test_answers_have_limits(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In size and in time: a byte every now and then is no answer."""
    monkeypatch.setenv(download.PRIVATE, "1")
    monkeypatch.setattr(download, "PATIENCE", 2)
    with pytest.raises(TimeoutError, match="not complete after 1 s"):
        ask(f"{site}/drip", timeout=0.5)
    monkeypatch.setattr(download, "MAX_BYTES", 1_000)
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        ask(f"{site}/0")
    before = threading.active_count()
    time.sleep(1.2)
    assert threading.active_count() <= before  # no timer outlives its answer
