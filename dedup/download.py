"""img2dataset as a program of its own, whose requests a list that nobody has vouched for cannot misuse.

`python -m dedup.download OPTIONS`, with the arguments of `img2dataset.download` as JSON. Its requests, which it makes
by `urllib`, go through an opener that knows http and https only, refuses addresses inside this machine or network
unless PRIVATE is set (also those that a name or a redirect leads to), and gives up on a server that sends for ever: too
much, or too slowly. Knows nothing of the rest of the project; `sources/urls.py` starts it.
"""

import http.client
import ipaddress
import json
import os
import signal
import socket
import string
import sys
import threading
import urllib.parse
import urllib.request
from typing import Any

MAX_BYTES = 1 << 27  # of one answer
PATIENCE = 30  # times the timeout, which is of each wait: what an answer may take in all
PRIVATE = "UNMEMORIZE_PRIVATE_ADDRESSES"  # set: they are allowed
HEARTBEAT = "UNMEMORIZE_HEARTBEAT"  # a file whose time says when the last request began


class Answer(http.client.HTTPResponse):
    """Of at most MAX_BYTES, within PATIENCE × the timeout, headers included; otherwise `read` raises OSError."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._late = late = threading.Event()
        self._allowed = PATIENCE * (sock.gettimeout() or 60)

        def end() -> None:  # holds no reference to the answer, which would live as long as the timer
            late.set()
            _shut(sock)

        self._timer = threading.Timer(self._allowed, end)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        if hasattr(self, "_timer"):
            self._timer.cancel()
        super().close()

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        pieces, size = [], 0
        while piece := super().read(1 << 20):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BYTES:
                raise OSError(f"more than {MAX_BYTES:,} bytes")
        if self._late.is_set():
            raise TimeoutError(f"not complete after {self._allowed:.0f} s")
        if self.length:
            raise http.client.IncompleteRead(b"".join(pieces), self.length)
        return b"".join(pieces)


def _shut(sock: socket.socket) -> None:
    """Wake whoever waits for it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # it is closed already
        return


def connect(address: tuple[str, int], timeout: Any = None, source: Any = None) -> socket.socket:
    """As `socket.create_connection`, to public addresses only. Raises PermissionError where a name has no other."""
    host, port = address
    # Behind a proxy it is the proxy that connects to the address in the list.
    if os.environ.get(PRIVATE) or urllib.request.getproxies():
        return socket.create_connection(address, timeout, source)
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    public = [place for place in dict.fromkeys(found) if is_public(place)]
    if not public:
        raise PermissionError(f"{host} ({found[0]}) is inside this machine or network: refused (--private allow)")
    for place in public[:-1]:
        try:
            return socket.create_connection((place, port), timeout, source)
        except OSError:
            continue
    return socket.create_connection((public[-1], port), timeout, source)


def is_public(place: str) -> bool:
    """Of an IP address."""
    address = ipaddress.ip_address(place.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_global and not address.is_multicast


class PlainConnection(http.client.HTTPConnection):
    response_class = Answer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = connect


class SecureConnection(http.client.HTTPSConnection):
    response_class = Answer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._create_connection = connect


class PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(PlainConnection, _prepare(req))


class SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(SecureConnection, _prepare(req))


def _prepare(req: urllib.request.Request) -> urllib.request.Request:
    """Escape what people write and a browser escapes: spaces, umlauts. Say that somebody is at work."""
    req.selector = urllib.parse.quote(req.selector, safe=string.punctuation)
    if path := os.environ.get(HEARTBEAT):
        os.utime(path)
    return req


def make_opener() -> urllib.request.OpenerDirector:
    """http and https, redirects and proxies; no files, no ftp, no `data:`."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        PlainHandler(),
        SecureHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _end_with_parent() -> None:
    """The other end of our standard input is held by whoever started us: when it closes, all of us end."""

    def wait() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ in ("__main__", "__mp_main__"):  # the latter in the processes that img2dataset starts
    urllib.request.install_opener(make_opener())

if __name__ == "__main__":
    from img2dataset import download

    _end_with_parent()
    download(**json.loads(sys.argv[1]))
