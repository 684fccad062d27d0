"""Remote images: every failure is a bad row, one time limit holds for all of it, and only public hosts are reached."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from loader_cases import chat, picture, write_images, write_lines

from prism.data.download import is_public
from prism.data.images import ImageLimits
from prism.data.loader import LoadOptions, dry_run


class Answers(BaseHTTPRequestHandler):
    """Answers as the path says."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.partition("?")[0]
        if kind == "/good.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture())
        elif kind == "/to":
            self.send_response(302)
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif kind in RAW:
            self.wfile.write(RAW[kind])
        elif kind in DRIPS:
            self.drip(*DRIPS[kind])
        else:
            self.send_error(404)

    def drip(self, head, piece):
        """Sends a piece every twentieth of a second, for longer than anybody waits."""
        self.wfile.write(head)
        for _ in range(400):
            if self.server.over.wait(0.05):
                return
            self.wfile.write(piece)

    def log_message(self, *arguments):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:
            # the client has hung up
            self.server.hung_up += 1


RAW = {
    "/status": b"no status line\r\n\r\n",
    "/nothing": b"",
    "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nfew bytes",
    "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx",
    "/header": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
    "/headers": b"HTTP/1.1 200 OK\r\n" + b"A: a\r\n" * 200 + b"\r\n",
}
DRIPS = {
    "/slow-header": (b"HTTP/1.1 200 OK\r\nA: ", b"a"),
    "/slow-body": (b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
}


@pytest.fixture
def serve():
    """Starts servers on this machine; each has the paths that it was asked for."""
    servers = []

    def start():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        server.asked, server.over, server.hung_up = [], threading.Event(), 0
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        servers.append(server)
        return server, f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def reason(tmp_path, address, **limits):
    """Returns cause and message of a row with a remote image, among good rows."""
    write_images(tmp_path)
    path = write_lines(tmp_path / "rows.jsonl", [chat(0), chat(1, images=[address]), chat(2)])
    tried = dry_run(path, "chat", LoadOptions(images=ImageLimits(allow_remote=True, **limits)))
    assert tried.accepted == 2
    ((cause, message),) = tried.first.items()
    assert message.startswith(f"{path}, row 2: images.0: ")
    return cause, message


@pytest.mark.parametrize("kind", [*RAW, "/gone"])
def test_a_broken_answer_is_a_bad_row(tmp_path, serve, kind):
    _, host = serve()
    cause, _ = reason(tmp_path, f"http://{host}{kind}", trusted=(host,))
    assert cause in ("image not found", "broken image")


ADDRESSES = [
    "http://[::1/x.png",
    "http://[not-an-address]/x.png",
    "http://a..b/x.png",
    "http://" + "a" * 70 + ".com/x.png",
    "http://exa mple.com/x.png",
    "http://example.com:port/x.png",
    "http://example.com:99999/x.png",
    "http://127.0.0.1:-1/x.png",
    "http:///x.png",
    "http://",
    "http://\u2025.example/x.png",
    "http://example.invalid/\u00fc.png",
    "http://user:word@/x.png",
    "ftp://127.0.0.1/x.png",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_malformed_address_is_a_bad_row(tmp_path, monkeypatch, address):
    # no test asks a name server
    monkeypatch.setattr(socket, "getaddrinfo", resolving({}))
    assert reason(tmp_path, address)[0] in ("image not found", "remote image")


REAL_LOOK_UP = socket.getaddrinfo


def resolving(known):
    """Returns a look-up of hosts that knows only these names, and addresses."""

    def look_up(host, port, *arguments, **named):
        if host in known:
            return [entry for ip in known[host] for entry in REAL_LOOK_UP(ip, port, *arguments, **named)]
        # encodes the name as the real look-up does
        host.encode("idna")
        return REAL_LOOK_UP(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)

    return look_up


@pytest.mark.parametrize("kind", DRIPS)
def test_one_time_limit_holds_for_the_whole_download(tmp_path, serve, kind):
    server, host = serve()
    started = time.monotonic()
    cause, message = reason(tmp_path, f"http://{host}{kind}", trusted=(host,), timeout=0.4)
    assert time.monotonic() - started < 3
    assert cause == "image not found" and "within 0.4 seconds" in message
    # the connection ends, too, and with it the thread that reads
    while not server.hung_up and time.monotonic() - started < 10:
        time.sleep(0.02)
    assert server.hung_up == 1


def test_redirects_count_towards_the_time_limit(tmp_path, serve):
    _, host = serve()
    address = f"http://{host}/slow-body"
    for _ in range(3):
        address = f"http://{host}/to?{address}"
    started = time.monotonic()
    assert "within 0.4 seconds" in reason(tmp_path, address, trusted=(host,), timeout=0.4)[1]
    assert time.monotonic() - started < 3


LOCAL = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "2130706433",
    "0x7f.1",
    "0.0.0.0",
    "[::ffff:127.0.0.1]",
    "[64:ff9b::7f00:1]",
]


@pytest.mark.parametrize("host", LOCAL)
def test_an_address_of_this_machine_is_refused_also_after_a_redirect(tmp_path, serve, host):
    inside, inside_host = serve()
    inner = f"http://{host}:{inside.server_port}/good.png"
    cause, message = reason(tmp_path, inner)
    assert cause == "remote image" and "expected a host with a public address" in message
    _, outside = serve()
    cause, message = reason(tmp_path, f"http://{outside}/to?{inner}", trusted=(outside,))
    assert cause == "remote image" and "expected a host with a public address" in message
    assert inside.asked == []
    for scheme in ("file:///etc/hostname", f"ftp://{inside_host}/good.png", "data:image/png;base64,AA"):
        assert reason(tmp_path, f"http://{outside}/to?{scheme}", trusted=(outside,))[0] == "image not found"


@pytest.mark.parametrize("addresses", [["10.1.2.3"], ["93.184.216.34", "192.168.0.1"], ["169.254.169.254"]])
def test_every_address_of_a_host_must_be_public(tmp_path, monkeypatch, addresses):
    monkeypatch.setattr(socket, "getaddrinfo", resolving({"images.example": addresses}))
    for scheme in ("http", "https"):
        cause, message = reason(tmp_path, f"{scheme}://images.example/x.png")
        assert cause == "remote image" and f"which is at {addresses[-1]}" in message


def test_the_address_that_was_checked_is_connected_to(tmp_path, serve, monkeypatch):
    """A second look-up could give another address: there is none."""
    server, _ = serve()
    names, dialled = [], []

    def look_up(host, *arguments, **named):
        names.append(host)
        return REAL_LOOK_UP("127.0.0.1", *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    real = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda address, *a, **k: (dialled.append(address), real(address, *a, **k))[1]
    )
    trusted = f"images.example:{server.server_port}"
    write_images(tmp_path)
    path = write_lines(tmp_path / "rows.jsonl", [chat(images=[f"http://{trusted}/good.png"])])
    options = LoadOptions(images=ImageLimits(allow_remote=True, trusted=(trusted,)))
    assert dry_run(path, "chat", options).accepted == 1
    assert dialled == [("127.0.0.1", server.server_port)] and names[0] == "images.example"


@pytest.mark.parametrize("proxied", ["http://127.0.0.1:{port}/good.png", "http://images.example/good.png"])
def test_a_proxy_of_the_environment_is_used_but_not_towards_this_machine(tmp_path, serve, monkeypatch, proxied):
    proxy, host = serve()
    monkeypatch.setenv("http_proxy", f"http://{host}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", resolving({}))
    address = proxied.format(port=proxy.server_port)
    cause, _ = reason(tmp_path, address)
    if "example" in address:
        # this server does not know what a proxy is: it gets the whole address as the path
        assert cause == "image not found" and proxy.asked == [address]
    else:
        assert cause == "remote image" and proxy.asked == []


@pytest.mark.parametrize(
    "address, public",
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("64:ff9b::5db8:d822", True), ("127.0.0.1", False),
        ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("240.0.0.1", False),
        ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1", False), ("fe80::1%2", False),
        ("fc00::1", False), ("fec0::1", False), ("ff02::1", False), ("::127.0.0.1", False), ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False), ("2002:7f00:1::", False), ("2001:db8::1", False), ("2001:0:1:2:3:4:5:6", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) == public
