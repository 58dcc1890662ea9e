"""A web server on loopback that answers as told, byte by byte, and counts what it is asked."""

import socket
import ssl
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

PNG = b"\x89PNG\r\n\x1a\n"


def picture(number: int) -> bytes:
    """Bytes that look like a picture, and differ from those of any other number."""
    return PNG + f"picture {number} ".encode() * (1 + number % 50)


@dataclass
class Request:
    """What arrived: `count` is 1 for the first request of this path."""

    socket: socket.socket
    path: str
    headers: dict[str, str]
    count: int
    leave: Callable[[], None]  # the request no longer counts as running

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, status: str, body: bytes = b"", *headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
        self.leave()
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Route = Callable[[Request], None]


@dataclass
class Server:
    """Routes by the longest prefix of the path. most: requests at a time; starts: their times, by address."""

    routes: dict[str, Route]
    port: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    starts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seen: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def serve(self, connection: socket.socket, host: str, tls: ssl.SSLContext | None) -> None:
        with suppress(OSError), connection:
            connection.settimeout(20)
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := connection.recv(65536)):
                    return
                head += data
            first, *lines = head.decode("latin-1").split("\r\n")
            path = first.split(" ")[1]
            with self.lock:
                self.hits[path] += 1
                self.running[host] += 1
                self.most[host] = max(self.most[host], self.running[host])
                self.starts[host].append(time.monotonic())
                headers = dict(line.split(": ", 1) for line in lines if ": " in line)
                self.seen.append(headers)
                count = self.hits[path]
            left = threading.Event()

            def leave() -> None:
                if not left.is_set():
                    left.set()
                    with self.lock:
                        self.running[host] -= 1

            route = max((p for p in self.routes if path.startswith(p)), key=len, default="")
            request = Request(connection, path, headers, count, leave)
            try:
                self.routes[route](request) if route else request.answer("404 Not Found")
            finally:
                leave()


@contextmanager
def serving(
    routes: dict[str, Route], hosts: tuple[str, ...] = ("127.0.0.1",), tls: ssl.SSLContext | None = None
) -> Iterator[Server]:
    """A server at these loopback addresses, all on one port; stopped at the end."""
    server = Server(routes)
    listeners: list[socket.socket] = []

    def accept(listener: socket.socket, host: str) -> None:
        while not server.closed:
            with suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=server.serve, args=(connection, host, tls), daemon=True).start()

    for host in hosts:
        listener = socket.create_server((host, server.port), backlog=256)
        server.port = listener.getsockname()[1]
        listeners.append(listener)
    threads = [threading.Thread(target=accept, args=pair, daemon=True) for pair in zip(listeners, hosts, strict=True)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        server.closed = True
        for listener in listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in threads:
            thread.join()
