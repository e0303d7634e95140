"""Fetching against a server on this machine: tests give the resolver and the connector, production has no way round.

The server speaks plain HTTP; `secure` notes for which name TLS was asked, and lets the connection be.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import batchsd.web
from batchsd.types import RowError
from batchsd.web import Web, is_public

PICTURE = b"\x89PNG" + bytes(range(256)) * 40
PUBLIC, OTHER = "93.184.216.34", "2606:2800:220:1::1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str]] = []
    busy = 0

    def do_GET(self) -> None:
        type(self).asked.append((self.headers["Host"], self.path))
        match self.path.partition("?")[0].strip("/"):
            case name if name.startswith("to/"):
                self.answer(302, b"", Location=self.path[4:])
            case "loop":
                self.answer(301, b"", Location="/loop")
            case "gone":
                self.answer(404, b"no such thing")
            case "busy" if type(self).busy > 0:
                type(self).busy -= 1
                self.answer(503, b"")
            case "packed":
                self.answer(200, PICTURE, **{"Content-Encoding": "gzip"})
            case "short":
                self.answer(200, PICTURE[:100], **{"Content-Length": str(len(PICTURE))})
            case "endless":
                self.pour()
            case _:
                self.answer(200, PICTURE)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def pour(self) -> None:
        """A body without a length, one slow byte after another, until the other end has enough."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            while not self.server.over.wait(0.01):  # type: ignore[attr-defined]
                self.wfile.write(b"x")
        except OSError:
            return

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.over = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.over.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


class Net:
    """A network of three hosts; `dialled` and `proved` are what it was asked for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.names = {"a.example": [PUBLIC], "b.example": [OTHER, PUBLIC], "inner.example": [PUBLIC, "10.0.0.7"]}
        self.dialled: list[tuple[str, int]] = []
        self.proved: list[str] = []
        self.resolved: list[str] = []
        self.slept: list[float] = []
        self.dead: set[str] = set()

    def resolve(self, host: str, port: int) -> list[str]:
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror(-2, "Name or service not known")
        return self.names[host]

    def dial(self, address: str, port: int) -> socket.socket:
        self.dialled.append((address, port))
        if address in self.dead:
            raise ConnectionRefusedError("refused")
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def secure(self, connection: socket.socket, host: str) -> socket.socket:
        self.proved.append(host)
        return connection.dup()  # as TLS does: the socket that is given away is no more

    def web(self, *hosts: str) -> Web:
        return Web(hosts, self.resolve, self.dial, self.secure, self.slept.append)


@pytest.fixture
def net(port: int) -> Net:
    Handler.asked.clear()
    return Net(port)


def test_a_picture_of_a_host_on_the_list(net: Net) -> None:
    found = net.web("a.example").fetch("https://A.example/some dir/p.png?size=%205&x=ü#part", 2**20)
    assert found == PICTURE
    assert net.dialled == [(PUBLIC, 443)], "the address that was checked"
    assert net.proved == ["a.example"], "TLS for the name"
    assert net.resolved == ["a.example"]
    assert Handler.asked == [("a.example", "/some%20dir/p.png?size=%205&x=%C3%BC")]


def test_another_port_is_another_host(net: Net) -> None:
    assert net.web("a.example:8443").fetch("https://a.example:8443/p", 2**20) == PICTURE
    assert net.dialled == [(PUBLIC, 8443)]
    with pytest.raises(RowError, match=r"a\.example is not one of input\.allow_hosts"):
        net.web("a.example:8443").fetch("https://a.example/p", 2**20)


def test_the_next_address_where_one_is_dead(net: Net) -> None:
    net.dead = {OTHER}
    assert net.web("b.example").fetch("https://b.example/p", 2**20) == PICTURE
    assert [address for address, _ in net.dialled] == [OTHER, PUBLIC]


def test_a_redirect_goes_the_whole_way_again(net: Net) -> None:
    web = net.web("a.example", "b.example")
    assert web.fetch("https://a.example/to/https://b.example/p", 2**20) == PICTURE
    assert net.proved == ["a.example", "b.example"] and net.resolved == ["a.example", "b.example"]
    assert web.fetch("https://a.example/to//other", 2**20) == PICTURE


REFUSED = {
    "another host": ("https://b.example/p", "not one of input.allow_hosts"),
    "a name that ends so": ("https://evil-a.example/p", "not one of input.allow_hosts"),
    "a name below": ("https://x.a.example/p", "not one of input.allow_hosts"),
    "plain http": ("http://a.example/p", "https only"),
    "a password": ("https://me:secret@a.example/p", "password"),
    "user info before another host": ("https://a.example@b.example/p", "password"),
    "another port": ("https://a.example:22/p", "a.example:22 is not one of"),
    "a number for a host": ("https://127.0.0.1/p", "not one of"),
    "no host": ("https:///p", "no host is not one of"),
    "a redirect to another host": ("https://a.example/to/https://b.example/p", "not one of input.allow_hosts"),
    "a redirect to http": ("https://a.example/to/http://a.example/p", "https only"),
    "a redirect within": ("https://a.example/to/https://169.254.169.254/meta", "not one of input.allow_hosts"),
    "a private address among the public": ("https://inner.example/p", "10.0.0.7, which is no public address"),
    "a redirect to a private address": (
        "https://a.example/to/https://inner.example/p", "10.0.0.7, which is no public address"),
    "round and round": ("https://a.example/loop", "more than 3 redirects"),
    "gone": ("https://a.example/gone", "HTTP 404"),
    "packed": ("https://a.example/packed", "content encoding"),
    "too long": ("https://a.example/long", "10,244 bytes, at most 10,000"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(net: Net, what: str) -> None:
    url, message = REFUSED[what]
    with pytest.raises(RowError, match=message) as error:
        net.web("a.example", "inner.example").fetch(url, 10_000)
    assert error.value.status == "bad_image" and "secret" not in str(error.value)
    assert not net.slept, "it would be the same in a moment"
    if not url.startswith(("https://a.example/", "https://inner")):
        assert not net.resolved, "nobody is asked"
    if "private" in what:
        assert "inner.example" not in net.proved


def test_a_busy_host_is_asked_again(net: Net) -> None:
    Handler.busy = 2
    assert net.web("a.example").fetch("https://a.example/busy", 2**20) == PICTURE
    assert net.slept == [1.0, 2.0]
    Handler.busy = 9
    with pytest.raises(RowError, match=r"HTTP 503 .*\(3 tries\)"):
        net.web("a.example").fetch("https://a.example/busy", 2**20)


@pytest.mark.parametrize(
    ("path", "message"), [("short", "100 of 10,244 bytes"), ("endless", "not whole after 0.2 seconds")]
)
def test_what_does_not_come_whole(net: Net, monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    monkeypatch.setattr(batchsd.web, "WHOLE_S", 0.2)
    with pytest.raises(RowError, match=message):
        net.web("a.example").fetch(f"https://a.example/{path}", 2**20)


def test_a_body_without_a_length_is_bounded(net: Net) -> None:
    with pytest.raises(RowError, match="more than 20 bytes"):
        net.web("a.example").fetch("https://a.example/endless", 20)


def test_a_host_that_nobody_knows_or_that_is_down(net: Net) -> None:
    with pytest.raises(RowError, match=r"c\.example: .*not known.* \(3 tries\)"):
        net.web("c.example").fetch("https://c.example/p", 20)
    net.dead = {PUBLIC}
    with pytest.raises(RowError, match=r"a\.example: refused \(3 tries\)"):
        net.web("a.example").fetch("https://a.example/p", 20)


def test_the_real_tls_wants_a_certificate(port: int) -> None:
    """The connector of production against a server that speaks none."""
    net = Net(port)
    web = Web(("a.example",), net.resolve, net.dial, batchsd.web.secured, net.slept.append)
    with pytest.raises(RowError, match="3 tries"):
        web.fetch("https://a.example/p", 20)
    assert not Handler.asked or all(path != "/p" for _, path in Handler.asked)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "192.0.2.1", "::", "::1", "fe80::1", "fc00::1", "ff02::1", "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "fe80::1%eth0", "nonsense",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", OTHER, "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)
