"""One URL at a time, from servers that lie, stall, drip, flood and break off."""

import asyncio
import gzip
import random
import ssl
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.download import Downloader, FetchConfig, Outcome, backoff
from data_pipeline.politeness import opted_out, retry_after
from tests.data_pipeline.hostile_server import PNG, Request, Route, Server, picture, serving

QUICK = FetchConfig(
    allow_private=True, ports=(), max_bytes=100_000, delay_s=0, tries=1, backoff_s=0.02,
    connect_s=10, read_s=1.5, total_s=4,  # wide enough for a machine that is busy with other things
)  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
BODY = picture(7)


def ok(request: Request) -> None:
    request.answer("200 OK", BODY, "Content-Type: image/png")


def download(config: FetchConfig, *urls: str) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with Downloader(config) as downloader:
            return await asyncio.gather(*(downloader.download(i, url) for i, url in enumerate(urls)))

    return asyncio.run(run())


def ask(routes: dict[str, Route], config: FetchConfig = QUICK, path: str = "/") -> tuple[Outcome, Server]:
    with serving(routes) as server:
        (outcome,) = download(config, server.url(path))
        return outcome, server


def sending(data: bytes, then: Callable[[Request], None] = lambda r: None) -> Route:
    def route(request: Request) -> None:
        request.send(data)
        then(request)

    return route


def forever(chunk: bytes, pause_s: float = 0.0) -> Callable[[Request], None]:
    def send(request: Request) -> None:
        began = time.monotonic()
        while time.monotonic() - began < 20:
            request.send(chunk)
            time.sleep(pause_s)

    return send


def stall(request: Request) -> None:
    time.sleep(6)


def garbage(request: Request) -> None:
    time.sleep(0.1)  # after the headers were read; aiohttp then closes the connection and tells nobody
    request.send(b"zz\r\nnot a length\r\n")


def test_the_bytes_arrive_and_the_request_is_polite() -> None:
    outcome, server = ask({"/": ok}, replace(QUICK, user_agent="my-lab/2.0 (+https://lab.test)"))
    assert outcome == Outcome(1, 200, server.url("/"), "image/png", BODY)
    (headers,) = server.seen
    assert headers["User-Agent"] == "my-lab/2.0 (+https://lab.test)" and headers["Accept-Encoding"] == "identity"
    assert headers["Host"] == f"127.0.0.1:{server.port}" and "Cookie" not in headers and "Referer" not in headers


BOMB = gzip.compress(bytes(50_000_000))
DEFLATED = zlib.compress(BODY)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

# name: (route, reason, retryable)
FAILURES: dict[str, tuple[Route, str, bool]] = {
    "404": (lambda r: r.answer("404 Not Found", BODY), "http 404", False),
    "410": (lambda r: r.answer("410 Gone"), "http 410", False),
    "403": (lambda r: r.answer("403 Forbidden", b"no"), "http 403", False),
    "500": (lambda r: r.answer("500 Oops"), "http 500", True),
    "503": (lambda r: r.answer("503 Later"), "http 503", True),
    "429": (lambda r: r.answer("429 Slow down"), "http 429", True),
    "204": (lambda r: r.answer("204 No Content"), "http 204", False),
    "206": (lambda r: r.answer("206 Partial Content", BODY), "http 206", False),
    "300 is no redirect": (lambda r: r.answer("300 Choices", b"", "Location: /ok"), "http 300", False),
    "stall before headers": (stall, "read timeout", True),
    "stall in headers": (sending(HEAD, stall), "read timeout", True),
    "stall in body": (sending(HEAD + b"Content-Length: 99\r\n\r\nabc", stall), "read timeout", True),
    "slow drip of body": (sending(HEAD + b"Content-Length: 9999\r\n\r\n", forever(b"a", 0.05)), "total timeout", True),
    "slow drip of headers": (sending(b"HTTP/1.1 200 OK\r\nX: ", forever(b"a", 0.05)), "total timeout", True),
    "length too long": (sending(HEAD + b"Content-Length: 5000\r\n\r\n" + BODY), "incomplete body", True),
    "length too large": (sending(HEAD + b"Content-Length: 999999999999\r\n\r\n" + BODY), "too large", False),
    "length negative": (sending(HEAD + b"Content-Length: -5\r\n\r\n" + BODY), "bad response", True),
    "length twice": (sending(HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"), "bad response", True),
    "endless body": (sending(HEAD + b"\r\n", forever(b"a" * 65536)), "too large", False),
    "endless chunks": (sending(CHUNKED, forever(b"ffff\r\n" + b"a" * 65535 + b"\r\n")), "too large", False),
    "endless header": (sending(b"HTTP/1.1 200 OK\r\nX: ", forever(b"a" * 65536)), "bad response", True),
    "endless headers": (sending(HEAD, forever(b"X: y\r\n" * 5000)), "bad response", True),
    "gzip bomb": (lambda r: r.answer("200 OK", BOMB, "Content-Encoding: gzip"), "too large", False),
    "gzip of nothing for ever": (
        sending(HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b""), forever(b"\0" * 65536)),
        "too large", False),
    "gzip cut": (
        lambda r: r.answer("200 OK", gzip.compress(BODY)[:-9], "Content-Encoding: gzip"), "incomplete body", True),
    "no gzip": (lambda r: r.answer("200 OK", BODY, "Content-Encoding: gzip"), "bad encoding", False),
    "brotli": (lambda r: r.answer("200 OK", BODY, "Content-Encoding: br"), "unsupported encoding", False),
    "two encodings": (
        lambda r: r.answer("200 OK", BODY, "Content-Encoding: gzip, gzip"), "unsupported encoding", False),
    "chunked garbage": (sending(CHUNKED, garbage), "read timeout", True),
    "chunks cut": (sending(CHUNKED + b"5\r\nabc"), "incomplete body", True),
    "reset in body": (
        sending(HEAD + b"Content-Length: 5000\r\n\r\nabc", lambda r: (time.sleep(0.1), r.reset())[1]),
        "incomplete body", True),
    "closed at once": (lambda r: None, "connection failed", True),
    "reset at once": (lambda r: r.reset(), "connection failed", True),
    "no HTTP": (sending(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "bad response", True),
    "binary": (sending(bytes(range(256)) * 10), "bad response", True),
    "empty body": (lambda r: r.answer("200 OK"), "empty body", False),
    "HTML": (
        lambda r: r.answer("200 OK", b"\n <!DOCTYPE html><p>Hi", "Content-Type: image/png"), "not a picture", False),
    "SVG": (lambda r: r.answer("200 OK", b"\xef\xbb\xbf<svg/>", "Content-Type: image/svg+xml"), "not a picture", False),
    "opted out": (lambda r: r.answer("200 OK", BODY, "X-Robots-Tag: noai"), "opted out", False),
    "opted out before a redirect": (
        lambda r: r.answer("302 Found", b"", "Location: /ok", "x-robots-tag: noimageai"), "opted out", False),
    "slow redirects": (
        lambda r: (time.sleep(1), r.answer("302 Found", b"", "Location: again"))[1], "total timeout", True),
    "redirect loop": (lambda r: r.answer("302 Found", b"", "Location: again"), "too many redirects", False),
    "redirect to a file": (
        lambda r: r.answer("302 Found", b"", "Location: file:///etc/passwd"), "scheme not allowed", False),
    "redirect to data": (
        lambda r: r.answer("302 Found", b"", "Location: data:image/png;base64,AA"), "scheme not allowed", False),
    "redirect nowhere": (lambda r: r.answer("302 Found"), "bad url", False),
    "redirect to nonsense": (lambda r: r.answer("301 Moved", b"", "Location: http://[::1"), "bad redirect", False),
    "redirect to a user": (lambda r: r.answer("307 T", b"", "Location: http://a:b@127.0.0.1/"), "bad url", False),
    "redirect to a number": (lambda r: r.answer("308 P", b"", "Location: //2130706433/"), "bad url", False),
    "redirect to no UTF-8": (sending(b"HTTP/1.1 302 X\r\nLocation: http://\xff\xfe/\r\n\r\n"), "bad redirect", False),
}  # fmt: skip


def test_every_failure_has_its_reason_and_none_outlives_its_caps() -> None:
    """All at the same time: the slowest of them, not their sum, is what may take as long as the caps allow."""
    with serving({f"/{i}/": route for i, (route, _, _) in enumerate(FAILURES.values())} | {"/ok": ok}) as server:
        began = time.monotonic()
        outcomes = download(replace(QUICK, per_host=100), *(server.url(f"/{i}/") for i in range(len(FAILURES))))
        assert time.monotonic() - began < 40  # 4 s on an idle machine; one after the other, 60
    found = {name: (o.reason, o.retryable) for name, o in zip(FAILURES, outcomes, strict=True)}
    assert found == {name: (reason, retryable) for name, (_, reason, retryable) in FAILURES.items()}
    assert all(o.tries == 1 and not o.data for o in outcomes)
    assert server.hits["/ok"] == 0


def test_what_is_odd_but_right_is_taken() -> None:
    def chunks(request: Request) -> None:
        for byte in BODY:
            request.send(b"1;x=y\r\n" + bytes([byte]) + b"\r\n")
        request.send(b"0\r\n\r\n")

    routes: dict[str, Route] = {
        "/gzip": lambda r: r.answer("200 OK", gzip.compress(BODY), "Content-Encoding: GZIP"),
        "/deflate": lambda r: r.answer("200 OK", DEFLATED, "Content-Encoding: deflate"),
        "/until-closed": sending(HEAD + b"\r\n" + BODY),
        "/chunks": sending(CHUNKED, chunks),
        "/redirect/": lambda r: r.answer("302 Found", b"x", "Location: ../moved?a=b#c"),
        "/moved?a=b": lambda r: r.answer("307 Moved", b"", f"Location: {r.headers['Host'].join(('http://', '/ok'))}"),
        "/followed": lambda r: r.answer("200 OK", BODY, "X-Robots-Tag: nofollow, noarchive, otherbot: noai"),
        "/ok": ok,
    }
    with serving(routes) as server:
        outcomes = download(QUICK, *(server.url(path) for path in routes))
        assert [(o.reason, o.data) for o in outcomes] == [("", BODY)] * len(routes)
        assert outcomes[list(routes).index("/redirect/")].url == server.url("/ok")


@pytest.mark.parametrize("size, fits", [(100_000, True), (100_001, False)])
def test_the_byte_cap_is_exact(size: int, fits: bool) -> None:
    data = PNG + bytes(size - len(PNG))
    packed = gzip.compress(data)
    routes: dict[str, Route] = {
        "/declared": lambda r: r.answer("200 OK", data),
        "/counted": sending(HEAD + b"\r\n" + data),
        "/unpacked": lambda r: r.answer("200 OK", packed, "Content-Encoding: gzip"),
    }
    with serving(routes) as server:
        outcomes = download(QUICK, *(server.url(path) for path in routes))
    assert [o.reason for o in outcomes] == ["" if fits else "too large"] * 3
    assert [len(o.data) for o in outcomes] == [size if fits else 0] * 3


def test_memory_is_bounded_on_endless_bodies_and_bombs() -> None:
    routes = {"/endless": FAILURES["endless body"][0], "/bomb": FAILURES["gzip bomb"][0]}
    with serving(routes) as server:
        urls = [server.url(path) for path in routes] * 4
        download(QUICK, *urls[:2])  # import, and warm up
        tracemalloc.start()
        outcomes = download(replace(QUICK, max_bytes=1_000_000, total_s=5), *urls)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert {o.reason for o in outcomes} == {"too large"}
    assert peak < 8 * 1_000_000 * 3  # each holds at most its cap while it grows (a bytearray may be copied)


def test_retries_end_in_the_bytes_or_after_so_many_tries() -> None:
    routes: dict[str, Route] = {
        "/twice": lambda r: ok(r) if r.count > 2 else r.answer("500 Oops"),
        "/never": lambda r: r.answer("502 Bad Gateway"),
        "/gone": lambda r: r.answer("410 Gone"),
        "/broken": lambda r: ok(r) if r.count > 1 else r.reset(),
    }
    with serving(routes) as server:
        twice, never, gone, broken = download(replace(QUICK, tries=3), *(server.url(p) for p in routes))
    assert (twice.data, twice.tries) == (BODY, 3) and (broken.data, broken.tries) == (BODY, 2)
    assert (never.reason, never.tries, never.retryable) == ("http 502", 3, True)
    assert (gone.reason, gone.tries) == ("http 410", 1)
    assert server.hits == {"/twice": 3, "/never": 3, "/gone": 1, "/broken": 2}


def test_backoff_doubles_is_capped_and_depends_on_the_row_alone() -> None:
    config = FetchConfig(backoff_s=0.5, backoff_cap_s=3.0)
    for attempt, full in ((1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (2000, 3.0)):
        waits = [backoff(config, row, attempt) for row in range(500)]
        assert waits == [backoff(config, row, attempt) for row in range(500)]
        # 500 uniform draws miss a tenth at either end with chance 2 * 0.9^500 < 1e-22
        assert 0.5 * full <= min(waits) < 0.55 * full and 0.95 * full < max(waits) <= full
    assert backoff(replace(config, seed=1), 3, 2) != backoff(config, 3, 2)


def test_retry_after_in_seconds_and_as_a_date() -> None:
    now = 1_800_000_000.5
    date = format_datetime(datetime.fromtimestamp(1_800_000_090, UTC), usegmt=True)
    assert (
        retry_after("120", now) == 120 and retry_after(" 0 ", now) == 0 and retry_after("9" * 400, now) == float("inf")
    )
    assert retry_after(date, now) == 89.5 and retry_after(date, now + 1000) == 0
    for text in ("", "-5", "1.5", "soon", "Fri, 99 Foo 2026 00:00:00 GMT", "٣"):
        assert retry_after(text, now) == 0, text


def test_a_host_that_asks_to_wait_is_left_alone_by_every_row() -> None:
    def route(request: Request) -> None:
        first = len(server.starts["127.0.0.1"]) == 1
        request.answer("429 Slow", b"", "Retry-After: 1") if first else ok(request)

    with serving({"/": route}) as server:
        urls = [server.url(f"/{i}") for i in range(6)]
        outcomes = download(replace(QUICK, tries=2, per_host=1), *urls)
        first, *rest = server.starts["127.0.0.1"]
        assert all(o.data for o in outcomes) and len(rest) == 6
        assert min(rest) - first >= 1.0


def test_a_host_that_asks_for_too_long_is_left_for_the_next_run() -> None:
    def route(request: Request) -> None:
        request.answer("503 Later", b"", "Retry-After: 3600")

    with serving({"/": route}, ("127.0.0.1", "127.0.0.2")) as server:
        began = time.monotonic()
        outcomes = download(replace(QUICK, tries=5, per_host=1), *(server.url(f"/{i}") for i in range(10)))
        assert time.monotonic() - began < 2
        assert sum(server.hits.values()) == 1
        assert sorted(o.reason for o in outcomes) == ["host asks to wait"] * 9 + ["http 503"]
        assert all(o.retryable for o in outcomes)


def test_no_host_gets_more_than_its_share_and_all_hosts_are_busy() -> None:
    def slow(request: Request) -> None:
        time.sleep(0.03)
        ok(request)

    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
    with serving({"/": slow}, hosts) as server:
        # all of one host first: they must not keep the others waiting
        urls = [server.url(f"/{i}", host) for host in hosts for i in range(12)]
        outcomes = download(replace(QUICK, per_host=3, concurrency=64, total_s=10, read_s=10), *urls)
        assert all(o.data for o in outcomes)
        assert dict(server.most) == dict.fromkeys(hosts, 3)
        begins = [min(times) for times in server.starts.values()]
        assert max(begins) - min(begins) < 0.5


def test_no_more_requests_at_a_time_than_allowed_over_all_hosts() -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def slow(request: Request) -> None:
        nonlocal inside, most
        with lock:
            inside, most = inside + 1, max(most, inside + 1)
        time.sleep(0.02)
        with lock:
            inside -= 1
        ok(request)

    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
    with serving({"/": slow}, hosts) as server:
        urls = [server.url(f"/{i}", host) for host in hosts for i in range(5)]
        assert all(o.data for o in download(replace(QUICK, concurrency=5, total_s=10, read_s=10), *urls))
    assert most == 5


def test_requests_to_one_host_keep_their_distance() -> None:
    with serving({"/": ok}, ("127.0.0.1", "127.0.0.2")) as server:
        urls = [server.url(f"/{i}", host) for i in range(6) for host in ("127.0.0.1", "127.0.0.2")]
        began = time.monotonic()
        assert all(o.data for o in download(replace(QUICK, delay_s=0.1), *urls))
        assert time.monotonic() - began < 2  # the two hosts side by side: 5 distances of 0.1 s
        for times in server.starts.values():
            # a request may reach the server late by the time a thread takes to start, never early
            assert sum(later - sooner for sooner, later in pairwise(times)) >= 0.45
            assert times[-1] - times[0] >= 0.45


@pytest.mark.parametrize(
    ("headers", "word"),
    [
        (["noai"], "noai"),
        (["NoAI"], "noai"),
        (["noimageai"], "noimageai"),
        (["noindex, nofollow"], "noindex"),
        (["nofollow,noimageindex"], "noimageindex"),
        (["none"], "none"),
        (["nofollow", "noai"], "noai"),
        (["*: noai"], "noai"),
        (["ldm-fetch: noai"], "noai"),
        (["otherbot: nofollow, ldm-fetch: noindex"], "noindex"),
        (["otherbot: noindex", "noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Friday, 25-Jun-10 15:00:00 UTC, noimageai"], "noimageai"),
        (["max-snippet:-1, max-image-preview:large, noai"], "noai"),
        ([], ""),
        (["all"], ""),
        (["nofollow, noarchive, nosnippet"], ""),
        (["otherbot: noai"], ""),
        (["otherbot: noindex, noai"], ""),
        (["otherbot: noai, ldm-fetch: all"], ""),
        (["noaim, xnoai, no ai"], ""),
        (["max-image-preview: none"], ""),
    ],
)
def test_robots_directives(headers: list[str], word: str) -> None:
    assert opted_out(headers, "ldm-fetch/1.0") == word
    assert opted_out(headers, "Mozilla/5.0 (compatible; ldm-fetch/1.0)") == word


def test_robots_can_be_overruled_only_when_told() -> None:
    routes = {"/": FAILURES["opted out"][0]}
    assert ask(routes)[0].reason == "opted out"
    assert ask(routes, replace(QUICK, honour_robots=False))[0].data == BODY


def test_a_redirect_is_checked_like_the_first_url() -> None:
    """The server is reached because its port is allowed; from there the way leads to a private address and port."""
    with serving({"/ok": ok}) as other:
        routes: dict[str, Route] = {"/port": lambda r: r.answer("302 F", b"", f"Location: {other.url('/ok')}")}
        with serving(routes) as server:
            (outcome,) = download(replace(QUICK, ports=(server.port,)), server.url("/port"))
            assert outcome.reason == "port not allowed" and str(other.port) in outcome.detail
            (outcome,) = download(QUICK, server.url("/port"))
            assert outcome.data == BODY
        assert other.hits["/ok"] == 1


def test_a_redirect_to_a_private_address_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 plays a public server here, so that only the way from there to 127.0.0.2 is refused."""
    import data_pipeline.addresses as addresses

    honest = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda a: a == "127.0.0.1" or honest(a))
    routes: dict[str, Route] = {
        "/number": lambda r: r.answer("302 F", b"", f"Location: //127.0.0.2:{r.headers['Host'].split(':')[1]}/ok"),
        "/metadata": lambda r: r.answer("302 F", b"", "Location: http://169.254.169.254/latest/meta-data/"),
        "/name": lambda r: r.answer("302 F", b"", "Location: http://inside.test/"),
        "/ok": ok,
    }

    async def lookup(host: str) -> list[str]:
        assert host == "inside.test"
        return ["10.1.2.3"]

    async def run(urls: list[str]) -> list[Outcome]:
        async with Downloader(replace(QUICK, allow_private=False), lookup) as downloader:
            return [await downloader.download(i, url) for i, url in enumerate(urls)]

    with serving(routes, ("127.0.0.1", "127.0.0.2")) as server:
        *refused, good = asyncio.run(run([server.url(path) for path in routes]))
        assert [o.reason for o in refused] == ["address not public"] * 3 and good.data == BODY
        assert len(server.starts["127.0.0.2"]) == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A self-signed certificate for 127.0.0.1 with its key, valid today."""
    import datetime as dt
    import ipaddress

    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    yield path


def test_tls_is_verified_and_never_left_by_a_redirect(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import aiohttp.connector

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving({"/ok": ok}) as plain:
        routes: dict[str, Route] = {
            "/ok": ok,
            "/down": lambda r: r.answer("302 F", b"", f"Location: {plain.url('/ok')}"),
        }
        with serving(routes, tls=context) as server:
            urls = [server.url(path).replace("http:", "https:") for path in routes]
            for outcome in download(QUICK, *urls):
                assert (outcome.reason, outcome.retryable, outcome.data) == ("tls error", False, b"")
            assert not server.hits
            # the same server, once its certificate is trusted
            trusting = ssl.create_default_context(cafile=str(certificate))
            monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
            good, down = download(replace(QUICK, read_s=2, total_s=4), *urls)
            assert good.data == BODY and down.reason == "bad redirect" and "https" in down.detail
        assert plain.hits["/ok"] == 0


@pytest.mark.parametrize(
    "setting",
    [
        {"tries": 0}, {"concurrency": 0}, {"per_host": 0}, {"max_bytes": 0}, {"rows_per_part": 0}, {"delay_s": -1.0},
        {"total_s": 0.0}, {"read_s": float("nan")}, {"backoff_s": float("inf")}, {"max_redirects": -1},
        {"user_agent": ""}, {"user_agent": "a\r\nX: y"}, {"user_agent": "é"},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}=[^\n]*$"):
        FetchConfig(**setting)  # type: ignore[arg-type]


def test_garbage_from_a_seeded_server_never_raises() -> None:
    """200 answers made from a right one by cutting and mixing: each ends as an outcome."""
    rng = random.Random(0)
    right = HEAD + b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

    def mutate() -> bytes:
        data = bytearray(right)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 9])] = rng.choice(
                [b"", bytes([rng.randrange(256)]), b"\r\n", b"0" * 30]
            )
        return bytes(data)

    answers = [mutate() for _ in range(200)]
    with serving({"/": lambda r: r.send(answers[int(r.path[1:])])}) as server:
        outcomes = download(replace(QUICK, per_host=20), *(server.url(f"/{i}") for i in range(200)))
    assert len(outcomes) == 200 and {o.reason == "" for o in outcomes} == {True, False}
    assert not [o for o in outcomes if o.reason == "unexpected error"]
    assert all(len(o.data) < 500 for o in outcomes)
