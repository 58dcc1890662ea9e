"""Which URLs are never followed: a table of hostile ones without a single connection, seen at the sockets."""

import asyncio
import ipaddress
import json
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.addresses import CheckedResolver, Refused, is_public, parse_url
from data_pipeline.download import Downloader, FetchConfig, Outcome
from data_pipeline.fetch import fetch
from tests.data_pipeline.hostile_server import picture, serving

_connects: list[Any] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto") and _connects is not None:
        _connects.append(arguments[1])


@pytest.fixture(scope="session")
def audit() -> None:
    """The interpreter reports every connect of every socket; such a hook cannot be taken back, only silenced."""
    sys.addaudithook(_hook)


@pytest.fixture
def connects(audit: None) -> Iterator[list[Any]]:
    """The addresses that were connected to during the test."""
    global _connects
    _connects = []
    yield _connects
    _connects = None


# What names resolve to here; other names do not exist.
NAMES = {
    "localhost": ["127.0.0.1"],
    "localhost.": ["127.0.0.1"],
    "sub.localhost": ["127.0.0.1"],
    "loopback6.test": ["::1"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "intranet": ["10.0.0.5"],
    "private.test": ["192.168.1.1"],
    "mixed.test": ["93.184.215.14", "127.0.0.1"],
    "mixed6.test": ["2606:2800:21f:cb07:6820:80da:af6b:8b2c", "fe80::1"],
    "zone.test": ["fe80::1%lo"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "sixtofour.test": ["2002:7f00:1::"],
    "unspecified.test": ["0.0.0.0"],
    "xn--lcalhost-55a.test": ["127.0.0.1"],
    "127.0.0.1.nip.test": ["127.0.0.1"],
    "a_b.test": ["172.31.255.255"],
}


async def names(host: str) -> list[str]:
    if host not in NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return NAMES[host]


# PORT stands for that of a server that waits on loopback.
HOSTILE = [
    # schemes
    "file:///etc/passwd", "file://localhost/etc/passwd", "ftp://127.0.0.1:PORT/", "gopher://127.0.0.1:PORT/_x",
    "data:image/png;base64,AAAA", "javascript:alert(1)", "dict://127.0.0.1:PORT/x", "ldap://127.0.0.1:PORT/",
    "jar:http://127.0.0.1:PORT/!/", "pipe:touch x", "ws://127.0.0.1:PORT/", "unix:///var/run/docker.sock",
    "//127.0.0.1:PORT/", "127.0.0.1:PORT/x", "/etc/passwd", "x.png", "http:", "http://", "http:///x", "https:x",
    "\thttp\t://127.0.0.1:PORT/", "ht\ntp://127.0.0.1:PORT/", "HTTP+UNIX://%2Fvar%2Frun/x",
    # loopback, by number
    "http://127.0.0.1:PORT/", "http://127.1:PORT/", "http://127.0.1:PORT/", "http://127:PORT/", "http://0:PORT/",
    "http://0.0.0.0:PORT/", "http://2130706433:PORT/", "http://0x7f000001:PORT/", "http://0x7f.0.0.1:PORT/",
    "http://0x7f.1:PORT/", "http://017700000001:PORT/", "http://0177.0.0.1:PORT/", "http://0177.1:PORT/",
    "http://127.0.0.1.:PORT/", "http://127.255.255.254:PORT/", "http://00000127.0.0.1:PORT/",
    "http://4294967297:PORT/", "http://127.0.0.0x1:PORT/", "http://1.1:PORT/", "http://127.0.0.1%00:PORT/",
    "http://%31%32%37.0.0.1:PORT/", "http://127%2e0%2e0%2e1:PORT/", "http://127.0.0.1,1:PORT/",
    # other forms of digits and dots, that IDNA makes plain
    "http://１２７.0.0.1:PORT/", "http://127。0。0。1:PORT/", "http://①②⑦.⓪.⓪.①:PORT/", "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:PORT/",
    "http://١٢٧.0.0.1:PORT/", "http://127.0.0.1。:PORT/",
    # IPv6
    "http://[::1]:PORT/", "http://[::]:PORT/", "http://[0:0:0:0:0:0:0:1]:PORT/", "http://[::ffff:127.0.0.1]:PORT/",
    "http://[::ffff:7f00:1]:PORT/", "http://[::127.0.0.1]:PORT/", "http://[64:ff9b::127.0.0.1]:PORT/",
    "http://[64:ff9b:1::7f00:1]:PORT/", "http://[2002:7f00:1::]:PORT/", "http://[fe80::1%25lo]:PORT/",
    "http://[fe80::1%lo]:PORT/", "http://[::1%25lo]:PORT/", "http://[fd00:ec2::254]/latest/meta-data/",
    "http://[ff02::1]:PORT/", "http://[2001:db8::1]:PORT/", "http://[2001:0:7f00:1::]:PORT/", "http://[::1", "http://::1/",
    "http://[v1.x]:PORT/", "http://[::1]x:PORT/",
    # private networks and metadata
    "http://169.254.169.254/latest/meta-data/", "http://169.254.169.254:80/", "http://2852039166/", "http://0xa9fea9fe/",
    "http://100.100.100.200/", "http://192.0.0.192/", "http://168.63.129.16/", "http://10.0.0.1/", "http://172.16.0.1/",
    "http://192.168.0.1/", "http://100.64.0.1/", "http://198.18.0.1/", "http://224.0.0.1/", "http://255.255.255.255/",
    # users, and parsers that disagree
    "http://user:secret@127.0.0.1:PORT/", "http://example.test@127.0.0.1:PORT/", "http://127.0.0.1:PORT@example.test/",
    "http://a\\@127.0.0.1:PORT/", "http://127.0.0.1:PORT\\@example.test/", "http://example.test#@127.0.0.1:PORT/",
    "http://example.test?@127.0.0.1:PORT/", "http:\\\\127.0.0.1:PORT\\", "http://127.0.0.1 :PORT/",
    "http://127.0.0.1\r\nHost: x:PORT/", "http://127.0.0.1\x00.example.test:PORT/", "http://:PORT/", "http://@:PORT/",
    "http://127.0.0.1:-1/", "http://127.0.0.1:99999/", "http://example..test/", "http://" + "a" * 64 + ".test/",
    "http://example.test/" + "a" * 9000, "http://exa mple.test/", "http://[::1]@example.test/",
    # names
    *(f"http://{name}:PORT/" for name in NAMES),
]  # fmt: skip


async def download_all(urls: list[str], config: FetchConfig) -> list[Outcome]:
    async with Downloader(config, names) as downloader:
        return await asyncio.gather(*(downloader.download(i, url) for i, url in enumerate(urls)))


def test_no_hostile_url_makes_one_connection(connects: list[Any]) -> None:
    with serving({"/": lambda r: r.answer("200 OK", picture(1))}) as server:
        urls = [url.replace("PORT", str(server.port)) for url in HOSTILE]
        assert len(urls) >= 120
        outcomes = asyncio.run(download_all(urls, FetchConfig(ports=(), tries=2, backoff_s=0)))
        assert connects == [] and not server.hits
        reasons = {o.reason for o in outcomes}
        assert reasons == {"bad url", "scheme not allowed", "address not public", "name not found"}
        assert not any(o.data or o.retryable for o in outcomes)
        # the guard sees what happens: the same addresses are reached when that is asked for
        allowed = asyncio.run(download_all(urls, FetchConfig(ports=(), tries=1, allow_private=True, connect_s=0.3)))
        assert sum(o.reason == "" for o in allowed) >= 8
        assert len(connects) >= sum(server.hits.values()) >= 8


def test_by_a_table_too_and_the_rows_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, *_: Any) -> list[Any]:
        if host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in NAMES[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    urls = [url.replace("PORT", "80") for url in HOSTILE]
    table = tmp_path / "urls.jsonl"
    table.write_text("\n".join(json.dumps({"url": url, "caption": "c"}) for url in urls))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
        report = fetch(str(table), tmp_path / "out", FetchConfig(rows_per_part=50, tries=1))
    assert report.delivered == 0 and sum(report.rejected.values()) == len(urls) and report.retryable == 0


@pytest.mark.parametrize("url", ["http://a.test:22/", "http://a.test:6379/x", "https://a.test:25/", "http://a.test:0/"])
def test_ports_for_other_services_are_refused(url: str) -> None:
    with pytest.raises(Refused, match="port not allowed"):
        parse_url(url, FetchConfig().ports, allow_private=False)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://user@example.test/", "bad url"),
        ("http://:secret@example.test/", "bad url"),
        ("http://@example.test\\@x/", "bad url"),
        ("http://10.0.0.1/", "address not public"),
        ("http://[::1]/", "address not public"),
        ("http://2130706433/", "bad url"),
    ],
)
def test_the_url_alone_is_enough_to_refuse(url: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        parse_url(url, FetchConfig().ports, allow_private=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("http://example.test/a b.png?x=1#y", "http://example.test/a%20b.png?x=1"),
        (" HTTPS://Bücher.test/ü.jpg \n", "https://xn--bcher-kva.test/%C3%BC.jpg"),
        ("http://8.8.8.8:8080/x", "http://8.8.8.8:8080/x"),
        ("http://[2606:4700:4700::1111]/x", "http://[2606:4700:4700::1111]/x"),
        ("http://[64:ff9b::8.8.8.8]/x", "http://[64:ff9b::808:808]/x"),
        ("http://example.test./x", "http://example.test./x"),
        ("http://a_b.1x.test:443/x", "http://a_b.1x.test:443/x"),
    ],
)
def test_ordinary_urls_are_taken(text: str, wanted: str) -> None:
    assert str(parse_url(text, FetchConfig().ports, allow_private=False)) == wanted


def test_public_addresses_against_the_standard_library() -> None:
    """Random addresses, half of them next to a border of a block. `ipaddress` of 3.11 knows most of the blocks."""
    rng = random.Random(0)
    borders = [2**24 * n for n in range(256)] + [int(ipaddress.IPv4Address(a)) for a in (
        "100.64.0.0", "100.128.0.0", "169.254.0.0", "169.255.0.0", "172.16.0.0", "172.32.0.0", "192.0.0.0", "192.0.1.0",
        "192.0.2.0", "192.0.3.0", "192.168.0.0", "192.169.0.0", "198.18.0.0", "198.20.0.0", "198.51.100.0",
        "198.51.101.0", "203.0.113.0", "203.0.114.0",
    )]  # fmt: skip
    values = [rng.getrandbits(32) for _ in range(1500)] + [b + d for b in borders for d in (-1, 0, 1) if b + d >= 0]
    differs = {"192.88.99.0/24", "168.63.129.16/32"}  # we refuse these two; the library calls them global
    for value in values:
        ip = ipaddress.IPv4Address(value)
        known = any(ip in ipaddress.IPv4Network(block) for block in differs)
        # the library calls multicast, and some of 192.0.0.0/24, global
        theirs = ip.is_global and not ip.is_multicast and not known and ip not in ipaddress.IPv4Network("192.0.0.0/24")
        assert is_public(str(ip)) == theirs, ip
    for _ in range(1500):
        ip6 = ipaddress.IPv6Address(rng.choice([0x2 << 124, 0x3 << 124, 0]) | rng.getrandbits(124 if _ % 2 else 128))
        assert not is_public(str(ip6)) or (ip6.is_global and ip6 in ipaddress.IPv6Network("2000::/3")), ip6
    assert is_public("2606:4700:4700::1111") and is_public("2a00:1450:4001::1") and is_public("64:ff9b::808:808")
    for text in ("64:ff9b::a00:1", "::ffff:8.8.8.8", "2002:808:808::", "2600::1%eth0", "", "8.8.8", "x", "3fff::1"):
        assert not is_public(text), text


def test_a_name_that_changes_its_answer_gains_nothing(connects: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Public when first asked, loopback ever after: each connection goes to what was checked for it, or nowhere."""
    asked: list[str] = []

    async def rebinding(host: str) -> list[str]:
        asked.append(host)
        return ["93.184.215.14"] if len(asked) == 1 else ["127.0.0.1"]

    tried: list[str] = []

    async def refuse(self: Any, sock: socket.socket, address: tuple[str, int]) -> None:
        tried.append(address[0])
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", refuse)

    async def run(server_url: str) -> list[Outcome]:
        async with Downloader(FetchConfig(tries=1, ports=()), rebinding) as downloader:
            first = await downloader.download(0, server_url)
            downloader._session.connector.clear_dns_cache()  # type: ignore[union-attr]
            return [first, await downloader.download(0, server_url)]

    with serving({"/": lambda r: r.answer("200 OK", picture(1))}) as server:
        first, second = asyncio.run(run(f"http://rebinding.test:{server.port}/"))
        assert (first.reason, second.reason) == ("connection failed", "address not public")
        assert tried == ["93.184.215.14"] and connects == [] and not server.hits and len(asked) == 2


def test_the_socket_itself_refuses_what_a_resolver_let_through(
    connects: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unchecked(self: CheckedResolver, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr(CheckedResolver, "resolve", unchecked)
    with serving({"/": lambda r: r.answer("200 OK", picture(1))}) as server:
        url = f"http://any.test:{server.port}/"
        (outcome,) = asyncio.run(download_all([url], FetchConfig(ports=(), tries=1)))
        assert outcome.reason == "address not public" and connects == [] and not server.hits
        (outcome,) = asyncio.run(download_all([url], FetchConfig(ports=(), tries=1, allow_private=True)))
        assert outcome.reason == "" and connects == [("127.0.0.1", server.port)]
