"""One URL -> its bytes, or a named reason: by hostile servers' rules, within caps of time and bytes."""

import asyncio
import logging
import random
import re
import socket
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from data_pipeline.addresses import CheckedResolver, Lookup, Refused, checked_socket, look_up, parse_url
from data_pipeline.politeness import Failed, Hosts, opted_out, retry_after
from data_pipeline.sources.columns import Columns

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from yarl import URL

log = logging.getLogger(__name__)

ACCEPT = "image/png,image/jpeg,image/webp,image/gif,image/bmp,*/*;q=0.1"
REDIRECTS = (301, 302, 303, 307, 308)
RETRYABLE = (408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 529)
_SHOWN = 200  # characters of a stranger's text kept in the ledger


@dataclass(frozen=True, kw_only=True)
class FetchConfig(Columns):
    """How a table of URLs is downloaded; which column says what: see Columns.

    rows_per_part: rows of the table that make one tar.      max_bytes: larger files are refused.
    concurrency: requests at a time, over all hosts; memory stays below concurrency x max_bytes.
    per_host, delay_s: requests at a time to one host, and seconds between two of them.
    tries: in one run; backoff_s doubles from try to try up to backoff_cap_s; a host that asks (Retry-After) for more
    than retry_after_cap_s is left for the next run.
    connect_s: to look up the name, connect and shake hands; read_s: to the first byte and between two; total_s: a try.
    honour_robots: X-Robots-Tag noai, noimageai, noindex or noimageindex is respected.
    allow_private: also addresses that are not public.      ports: empty means any.
    """

    rows_per_part: int = 1000
    max_bytes: int = 20_000_000
    concurrency: int = 64
    per_host: int = 4
    delay_s: float = 0.05
    tries: int = 3
    backoff_s: float = 1.0
    backoff_cap_s: float = 30.0
    retry_after_cap_s: float = 60.0
    connect_s: float = 10.0
    read_s: float = 10.0
    total_s: float = 60.0
    max_redirects: int = 5
    honour_robots: bool = True
    allow_private: bool = False
    ports: tuple[int, ...] = (80, 443, 8080, 8443)
    user_agent: str = "ldm-fetch/1.0"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows_per_part", "max_bytes", "concurrency", "per_host", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("delay_s", "backoff_s", "backoff_cap_s", "retry_after_cap_s", "max_redirects"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: not negative, and finite")
        for name in ("connect_s", "read_s", "total_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: more than 0 seconds, and finite")
        if not re.fullmatch(r"[ -~]{1,200}", self.user_agent):
            raise ValueError(f"user_agent={self.user_agent!r}: 1 to 200 printable ASCII characters")


@dataclass(frozen=True)
class Outcome:
    """How one row ended: with bytes, or (`reason` is not empty) without. `url` is where the bytes were found."""

    tries: int
    status: int = 0
    url: str = ""
    content_type: str = ""
    data: bytes = field(default=b"", repr=False)
    reason: str = ""
    detail: str = ""
    retryable: bool = False


def backoff(config: FetchConfig, row: int, attempt: int) -> float:
    """Seconds to wait after failed try `attempt` (1, 2, ...): backoff_s * 2^(attempt - 1), capped, times [1/2, 1].

    The factor is drawn from (seed, row, attempt): rows that failed together do not come back together.
    """
    full = min(config.backoff_cap_s, config.backoff_s * 2.0 ** min(attempt - 1, 64))
    return full * random.Random(f"{config.seed}/{row}/{attempt}").uniform(0.5, 1.0)


class Downloader:
    """Downloads many URLs at a time; use as `async with Downloader(config) as d: outcome = await d.download(...)`."""

    def __init__(self, config: FetchConfig, lookup: Lookup = look_up) -> None:
        self.config = config
        self._lookup = lookup
        self._hosts = Hosts(config.concurrency, config.per_host, config.delay_s, config.retry_after_cap_s)

    async def __aenter__(self) -> Self:
        import aiohttp

        connector = aiohttp.TCPConnector(
            limit=0,  # `Hosts` counts
            resolver=CheckedResolver(self.config.allow_private, self._lookup),  # type: ignore[arg-type]
            socket_factory=checked_socket(self.config.allow_private),
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, connect=self.config.connect_s, sock_read=self.config.read_s),
            headers={"User-Agent": self.config.user_agent, "Accept": ACCEPT, "Accept-Encoding": "identity"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy would connect to addresses that nobody checked
        )
        self._session._retry_connection = False  # aiohttp's own second request: at once, unasked and uncounted
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def download(self, row: int, url: str) -> Outcome:
        """The bytes behind `url`, or why there are none; never raises for anything a server does."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._try(url, attempt)
            except Refused as refused:
                return Outcome(attempt, reason=refused.reason, detail=_shown(refused.detail))
            except Failed as failed:
                patient = attempt < self.config.tries and failed.wait_s <= self.config.retry_after_cap_s
                if not (failed.retryable and patient):
                    detail = _shown(failed.detail)
                    return Outcome(attempt, reason=failed.reason, detail=detail, retryable=failed.retryable)
                await asyncio.sleep(max(failed.wait_s, backoff(self.config, row, attempt)))

    async def _try(self, text: str, attempt: int) -> Outcome:
        """One try: follow redirects by hand, each checked like the first. Raises Failed or Refused."""
        config = self.config
        url = parse_url(text, config.ports, config.allow_private)
        left = config.total_s
        for _ in range(config.max_redirects + 1):
            async with self._hosts.turn(_host(url)):
                began = time.monotonic()
                found = await self._request(url, left)
                left -= time.monotonic() - began
            if isinstance(found, tuple):
                data, content_type = found
                return Outcome(attempt, 200, str(url), content_type, data)
            if url.scheme == "https" and found.scheme == "http":
                raise Failed("bad redirect", f"from https to {found}")
            url = found
        raise Failed("too many redirects", f"more than {config.max_redirects}")

    async def _request(self, url: "URL", seconds: float) -> "tuple[bytes, str] | URL":
        """(bytes, content type), or where to look instead. Raises Failed or Refused."""
        import aiohttp

        try:
            async with asyncio.timeout(seconds), self._session.get(url, allow_redirects=False) as response:
                return await self._answer(response)
        except (Failed, Refused):
            raise
        except aiohttp.ConnectionTimeoutError as error:
            raise Failed("connect timeout", f"{self.config.connect_s} s", True) from error
        except aiohttp.SocketTimeoutError as error:
            raise Failed("read timeout", f"no byte for {self.config.read_s} s", True) from error
        except TimeoutError as error:
            raise Failed("total timeout", f"{self.config.total_s} s", True) from error
        except aiohttp.ClientConnectorDNSError as error:
            unknown = error.os_error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
            raise Failed("name not found", str(error.os_error), not unknown) from error
        except aiohttp.ClientSSLError as error:
            raise Failed("tls error", str(error)) from error
        except aiohttp.ClientPayloadError as error:
            raise Failed("incomplete body", str(error), True) from error
        except aiohttp.ClientResponseError as error:
            raise Failed("bad response", str(error), True) from error
        except aiohttp.InvalidURL as error:
            raise Failed("bad url", str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failed("connection failed", f"{type(error).__name__}: {error}", True) from error
        except Exception as error:  # what one server made the client trip over must not stop the run
            log.warning("%s: %s: %s", url, type(error).__name__, error)
            raise Failed("unexpected error", f"{type(error).__name__}: {error}", True) from error

    async def _answer(self, response: "ClientResponse") -> "tuple[bytes, str] | URL":
        status, headers = response.status, response.headers
        if status != 200 and status not in REDIRECTS:
            wait = retry_after(headers.get("Retry-After", ""), time.time()) if status in (429, 503) else 0.0
            self._hosts.hold(_host(response.url), wait)
            raise Failed(f"http {status}", response.reason or "", status in RETRYABLE, wait)
        if self.config.honour_robots and (
            word := opted_out(headers.getall("X-Robots-Tag", []), self.config.user_agent)
        ):
            raise Failed("opted out", f"X-Robots-Tag: {word}")
        if status in REDIRECTS:
            return self._redirect(response)
        if response.content_length is not None and response.content_length > self.config.max_bytes:
            raise Failed("too large", f"{response.content_length} bytes declared, at most {self.config.max_bytes}")
        data = await _body(response, self.config.max_bytes, self.config.read_s)
        kind = _shown(headers.get("Content-Type", ""))
        if not data:
            raise Failed("empty body", kind)
        if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            raise Failed("not a picture", f"HTML or XML, declared as {kind or 'nothing'}")
        return data, kind

    def _redirect(self, response: "ClientResponse") -> "URL":
        from yarl import URL

        location = response.headers.get("Location", "")
        try:
            target = str(response.url.join(URL(location)))
        except ValueError as error:
            raise Failed("bad redirect", f"to {location!r}") from error
        try:
            return parse_url(target if location else "", self.config.ports, self.config.allow_private)
        except Refused as refused:
            raise Refused(refused.reason, f"redirect to {location!r}: {refused.detail}") from refused


async def _body(response: "ClientResponse", max_bytes: int, read_s: float) -> bytes:
    """All of the body, decoded. Both what arrives and what comes out of it stay below `max_bytes`."""
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise Failed("unsupported encoding", encoding)
    unzip: Any = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding not in ("", "identity") else None
    data, received = bytearray(), 0
    while chunk := await _next(response, read_s):
        received += len(chunk)
        try:
            data += unzip.decompress(chunk, max_bytes + 1 - len(data)) if unzip else chunk
        except zlib.error as error:
            raise Failed("bad encoding", f"{encoding}: {error}") from error
        if max(received, len(data)) > max_bytes:
            raise Failed("too large", f"more than {max_bytes} bytes")
    if unzip and not unzip.eof:
        raise Failed("incomplete body", f"{encoding} stream cut short", True)
    return bytes(data)


async def _next(response: "ClientResponse", read_s: float) -> bytes:
    """What has arrived, b"" at the end. The session's own `sock_read` stops its watch after a broken chunk."""
    try:
        async with asyncio.timeout(read_s):
            return await response.content.readany()
    except TimeoutError as error:
        raise Failed("read timeout", f"no byte for {read_s} s", True) from error


def _host(url: "URL") -> str:
    return (url.raw_host or "").rstrip(".")


def _shown(text: str) -> str:
    """A stranger's text, fit for a ledger."""
    return text.encode("utf-8", "replace").decode()[:_SHOWN]
