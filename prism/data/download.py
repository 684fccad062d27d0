"""Downloads from public addresses only, within one time limit for all of it."""

import http.client
import socket
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from prism.data.files import RowError, shown

# an IPv6 network whose addresses end in the IPv4 address to which a gateway translates them
_NAT64 = IPv6Network("64:ff9b::/96")


def download(address: str, field: str, most: int, seconds: float, trusted: Collection[str] = ()) -> bytes:
    """Returns the first bytes at an http or https address, or raises `RowError`.

    Every host, that of a redirect too, is looked up once; all its addresses must be public, and one of them is
    connected to. Where the environment names a proxy, the proxy looks the host up again and connects to it.

    Args:
        address: the address.
        field: the image's field, which errors name.
        most: number of bytes.
        seconds: time limit for the look-up of hosts, redirects and reading together.
        trusted: hosts with their ports that may have other addresses.
    """
    dialer = _Dialer(field, seconds, trusted)
    results: list[bytes | Exception] = []

    def fetch() -> None:
        try:
            with dialer.opener().open(address, timeout=seconds) as response:
                results.append(response.read(most))
        # urllib raises many types, those of http.client and UnicodeError among them
        except Exception as error:
            results.append(error)

    # a socket's own time limit is for one read, and the look-up of a host has none
    thread = Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    result = results[0] if results else TimeoutError(f"nothing whole came within {seconds:g} seconds")
    if isinstance(result, bytes):
        return result
    dialer.hang_up()
    if isinstance(result, RowError):
        raise result
    raise RowError("image not found", field, f"expected an image at {shown(address)}: {result}") from None


def is_public(address: str) -> bool:
    """Returns whether an IP address, or the IPv4 address that it embeds, belongs to the public network."""
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        if ip.is_site_local:
            return False
        translated = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or translated or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class _Dialer:
    """Connects to checked addresses, and can end its connections from another thread."""

    def __init__(self, field: str, seconds: float, trusted: Collection[str]) -> None:
        self.field, self.seconds, self.trusted = field, seconds, trusted
        self._open: list[socket.socket] = []
        self._over = False

    def opener(self) -> urllib.request.OpenerDirector:
        """Returns an opener of http and https addresses. urllib's own also opens ftp, after a redirect."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.UnknownHandler(),
            _Handler(self),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPRedirectHandler(),
            urllib.request.HTTPErrorProcessor(),
        ):
            opener.add_handler(handler)
        return opener

    def look_up(self, host: str, port: int) -> list[str]:
        """Returns the addresses of a host, all of them public."""
        addresses = [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        local = [address for address in addresses if not is_public(address)]
        if local and f"{host}:{port}" not in self.trusted:
            problem = f"expected a host with a public address, got {shown(host)}, which is at {local[0]}"
            raise RowError("remote image", self.field, problem)
        return addresses

    def dial(self, host: str, port: int) -> socket.socket:
        """Returns a connection to a host."""
        failure = OSError(f"no address of {host}")
        for address in self.look_up(host, port):
            try:
                connection = socket.create_connection((address, port), self.seconds)
            except OSError as error:
                failure = error
                continue
            self.keep(connection)
            return connection
        raise failure

    def keep(self, connection: socket.socket) -> None:
        """Remembers a connection that `hang_up` ends."""
        self._open.append(connection)
        if self._over:
            self.hang_up()

    def hang_up(self) -> None:
        """Ends all connections, so that the thread that waits for them ends."""
        self._over = True
        for connection in self._open:
            # an error means that it has ended
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Http(http.client.HTTPConnection):
    dialer: _Dialer

    def connect(self) -> None:
        self.sock = self.dialer.dial(self.host, self.port)


class _Https(http.client.HTTPSConnection, _Http):
    def connect(self) -> None:
        # HTTPSConnection's method calls that of the class after it, `_Http`, and encrypts that connection
        super().connect()
        self.dialer.keep(self.sock)


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, dialer: _Dialer) -> None:
        super().__init__()
        self.dialer = dialer

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._connect(_Http, http.client.HTTPConnection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._connect(_Https, http.client.HTTPSConnection, request)

    def _connect(
        self, direct: type[_Http], proxied: type[http.client.HTTPConnection], request: urllib.request.Request
    ) -> http.client.HTTPResponse:
        def connection(host: str, **named: Any) -> http.client.HTTPConnection:
            made = direct(host, **named)
            made.dialer = self.dialer
            return made

        target = urlsplit(request.full_url)
        if request.host == target.netloc:
            return self.do_open(connection, request)
        # a proxy of the environment connects; it may know hosts that this machine does not
        with suppress(OSError):
            self.dialer.look_up(target.hostname or "", target.port or 0)
        return self.do_open(proxied, request)
