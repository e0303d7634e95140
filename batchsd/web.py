"""Pictures over https, from hosts that the job names; nothing inside the network that this machine stands in.

    URL -> host on the job's list -> its addresses, all of them public -> a connection to that very address
        -> TLS for the host's name -> at most so many bytes, in at most so many seconds

A name is resolved once a connection, so that nobody can answer differently to the check and to the use. A redirect is
a new URL and goes the whole way again. Proxies, cookies, passwords and other ports than the list's are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, urljoin, urlsplit

from batchsd.redact import redact
from batchsd.types import RowError

MAX_REDIRECTS = 3
TRIES, PAUSE_S = 3, 1.0  # of an answer that may be another in a moment; the pause doubles
CONNECT_S, WHOLE_S = 10.0, 60.0  # to a connection; from there to the last byte
PORT = 443

Resolve = Callable[[str, int], list[str]]
"""A host's name -> its addresses, as text."""
Dial = Callable[[str, int], socket.socket]
"""An address and a port -> a connection."""
Secure = Callable[[socket.socket, str], socket.socket]
"""A connection, and the name that its other end must prove -> the same, under TLS."""


class _Busy(Exception):
    """An answer, or the lack of one, that may be another in a moment."""


def resolved(host: str, port: int) -> list[str]:
    """What the system's resolver says."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def dialled(address: str, port: int) -> socket.socket:
    return socket.create_connection((address, port), timeout=CONNECT_S)


def secured(connection: socket.socket, host: str) -> socket.socket:
    return _tls().wrap_socket(connection, server_hostname=host)


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reading the system's certificates takes 20 ms


@dataclass(frozen=True, slots=True)
class Web:
    """Fetches from `hosts`: names, each with `:port` where that is not 443. The functions are the network's."""

    hosts: Collection[str]
    resolve: Resolve = resolved
    dial: Dial = dialled
    secure: Secure = secured
    sleep: Callable[[float], object] = time.sleep

    def fetch(self, url: str, most: int) -> bytes:
        """The file of that URL, of at most `most` bytes. Raises RowError `bad_image`."""
        for tries in range(TRIES):
            if tries:
                self.sleep(PAUSE_S * 2 ** (tries - 1))
            try:
                return self._follow(url, most)
            except _Busy as error:
                cause = str(error)
        raise _bad(url, f"{cause} ({TRIES} tries)")

    def _follow(self, url: str, most: int) -> bytes:
        here = url
        for _ in range(MAX_REDIRECTS + 1):
            host, port, target = self._place(here)
            found = self._get(here, host, port, target, most)
            if isinstance(found, bytes):
                return found
            here = urljoin(here, found)
        raise _bad(url, f"more than {MAX_REDIRECTS} redirects")

    def _place(self, url: str) -> tuple[str, int, str]:
        """(host, port, path and query) of a URL that may be asked. Raises RowError."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").encode("idna").decode().rstrip("."), parts.port or PORT
        except ValueError:  # UnicodeError is one
            raise _bad(url, "not a URL") from None
        if parts.scheme.lower() != "https":
            raise _bad(url, "pictures are fetched over https only")
        if parts.username is not None or parts.password is not None:
            raise _bad(url, "a URL with a password is not asked")
        named = host if port == PORT else f"{host}:{port}"
        if named not in {name.lower() for name in self.hosts}:
            raise _bad(url, f"{named or 'no host'} is not one of input.allow_hosts")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        return host, port, f"{path}?{query}" if query else path

    def _get(self, url: str, host: str, port: int, target: str, most: int) -> bytes | str:
        """The file, or where it has gone. Raises RowError, or _Busy."""
        connection = self._connected(url, host, port)
        # One slow byte after another passes any timeout of a single read: this ends the whole, from outside.
        line, late = connection.dup(), threading.Event()

        def end() -> None:
            late.set()
            with suppress(OSError):  # it is closed already
                line.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(WHOLE_S, end)
        watch.daemon = True
        watch.start()
        try:
            with closing(_Pinned(host, port, lambda: self.secure(connection, host))) as client:
                client.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
                with client.getresponse() as response:
                    content = _read(url, response, most)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, ssl.SSLCertVerificationError):
                raise _bad(url, error.verify_message) from None
            raise _Busy(_first_line(error)) from None
        finally:
            watch.cancel()
            line.close()
            connection.close()
        if late.is_set():
            raise _Busy(f"not whole after {WHOLE_S:g} seconds")
        return content

    def _connected(self, url: str, host: str, port: int) -> socket.socket:
        """A connection to one of the host's addresses, after all of them were found to be public."""
        try:
            addresses = self.resolve(host, port)
        except OSError as error:
            raise _Busy(f"{host}: {_first_line(error)}") from None
        inner = [address for address in addresses if not is_public(address)]
        if inner or not addresses:
            raise _bad(url, f"{host} is {inner[0] if inner else 'nowhere'}, which is no public address")
        cause: OSError | None = None
        for address in addresses:
            try:
                return self.dial(address, port)
            except OSError as error:
                cause = error
        raise _Busy(f"{host}: {_first_line(cause)}")


class _Pinned(http.client.HTTPConnection):
    """HTTP over a connection that was made elsewhere, once."""

    def __init__(self, host: str, port: int, secure: Callable[[], socket.socket]) -> None:
        super().__init__(host, port)
        self.default_port = PORT  # so that the Host header leaves it out
        self.secure = secure

    def connect(self) -> None:
        self.sock = self.secure()


def is_public(address: str) -> bool:
    """Whether an address, or the IPv4 address that an IPv6 one stands for, is of the public internet."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in ipaddress.ip_network("64:ff9b::/96"):  # what a network without IPv4 calls IPv4 hosts
            inner = ipaddress.IPv4Address(found.packed[-4:])
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast and not found.is_reserved


def _read(url: str, response: http.client.HTTPResponse, most: int) -> bytes | str:
    """The answer's file, or its Location."""
    if response.status in (301, 302, 303, 307, 308):
        return response.getheader("Location") or ""
    if response.status in (408, 425, 429) or response.status >= 500:
        raise _Busy(f"HTTP {response.status} {response.reason}")
    if response.status != 200:
        raise _bad(url, f"HTTP {response.status} {response.reason}")
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise _bad(url, "an answer in a content encoding that was not asked for")
    length = response.length
    if length is not None and length > most:
        raise _bad(url, f"{length:,} bytes, at most {most:,}")
    content = response.read(most + 1)
    if len(content) > most:
        raise _bad(url, f"more than {most:,} bytes")
    if length is not None and len(content) < length:
        raise _Busy(f"{len(content):,} of {length:,} bytes came")
    return content


def _bad(url: str, what: str) -> RowError:
    shown = redact(url if len(url) <= 200 else url[:197] + "...")
    return RowError("bad_image", f"{shown}: {what}")


def _first_line(error: BaseException | None) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
