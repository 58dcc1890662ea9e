"""Which URLs may be fetched: http and https to public addresses, judged by the very address that is connected to.

A URL from a table is written by a stranger. Followed blindly it reads this machine's own services, its network's
and its cloud's metadata server (server-side request forgery, CWE-918). Three checks, each enough for what it sees:
`parse_url` for what a URL says, `CheckedResolver` for what a name resolves to, and `checked_socket`, which sees the
address of every connection at the moment it is made, so that a name that changes its answer gains nothing.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yarl import URL

# Python's own `is_global` changed between patch releases, so the blocks are written out:
# IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890), without those that are globally reachable.
NOT_PUBLIC_V4 = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # shared by carriers; one cloud's metadata
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # one cloud's host agent, public only by its number
    "169.254.0.0/16",  # link-local; metadata of most clouds
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # protocol assignments; one cloud's metadata
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",  # private
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, broadcast
)
PUBLIC_V6 = "2000::/3"  # all that is given out as global unicast; anything else is something else
NOT_PUBLIC_V6 = (
    "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4: an IPv4 address, possibly a private one, inside
    "3ffe::/16",  # returned
    "3fff::/20",  # documentation
)
NAT64 = "64:ff9b::/96"  # how an IPv6-only network reaches IPv4: public when the address inside is
MAX_URL = 8192  # characters

_HOST = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")  # parsers disagree about these, and nobody needs them

Lookup = Callable[[str], Awaitable[list[str]]]  # a name -> its addresses as text; raises OSError


class Refused(ValueError):
    """A URL or address must not be fetched. `reason`: a short stable phrase (it is counted); `detail`: free text."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address, as text, is a public one; False for anything else.

    IPv4-mapped, 6to4 and Teredo addresses are never public here, nor is one with a zone (`%eth0`): a public server
    has a plain address.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip in ipaddress.IPv6Network(NAT64):
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            inside = (ip in ipaddress.IPv6Network(block) for block in NOT_PUBLIC_V6)
            return ip in ipaddress.IPv6Network(PUBLIC_V6) and not any(inside)
    return not any(ip in ipaddress.IPv4Network(block) for block in NOT_PUBLIC_V4)


def parse_url(text: str, ports: tuple[int, ...], allow_private: bool) -> "URL":
    """The URL, in the one form that is also what is connected to. Raises Refused.

    Allowed are http and https, no user or password, a port of `ports` (empty: any), and as host a name or an address
    in its usual form: no `127.1`, `0x7f000001`, `017700000001` or `2130706433`. Unless `allow_private`, an address
    must be public; what a name stands for is seen later, by `CheckedResolver`.
    """
    from yarl import URL

    text = text.strip()
    if not text or len(text) > MAX_URL or _CONTROL.search(text):
        raise Refused("bad url", f"{text[:80]!r}: empty, over {MAX_URL} characters, or with control characters or \\")
    try:
        url = URL(text).with_fragment(None)
        host = url.raw_host or ""
    except ValueError as error:  # a surrogate, a port out of range, a bracket left open, ...
        raise Refused("bad url", f"{text[:80]!r}: {error}") from error
    if url.scheme not in ("http", "https"):
        raise Refused("scheme not allowed", f"{url.scheme or 'none'}: allowed are http and https")
    if url.raw_user is not None or url.raw_password is not None:
        raise Refused("bad url", "it carries a user or a password")
    if ":" in host or _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
        _check_literal(host, allow_private)
    elif not _HOST.fullmatch(host):
        raise Refused("bad url", f"host {host[:80]!r}")
    if ports and url.port not in ports:
        raise Refused("port not allowed", f"{url.port}: allowed are {', '.join(map(str, ports))}")
    return url


def _check_literal(host: str, allow_private: bool) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise Refused("bad url", f"host {host[:80]!r} is a number but not an address in its usual form") from error
    check_address(host, host, allow_private)


def check_address(address: str, host: str, allow_private: bool) -> None:
    """Raises Refused for an address that is not public, unless private ones are allowed."""
    if not allow_private and not is_public(address):
        raise Refused("address not public", address if address == host else f"{host} is {address}")


async def look_up(host: str) -> list[str]:
    """The addresses of a name, by the system's resolver. Raises OSError (socket.gaierror)."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(info[4][0]) for info in infos]


class CheckedResolver:
    """Names -> addresses for aiohttp, every one of them checked: a name with one private address is refused whole."""

    def __init__(self, allow_private: bool, lookup: Lookup = look_up) -> None:
        self.allow_private = allow_private
        self.lookup = lookup

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[dict[str, Any]]:
        """What aiohttp connects to. Raises Refused, or OSError when the name is not found."""
        found = []
        for address in dict.fromkeys(await self.lookup(host)):
            check_address(address, host, self.allow_private)
            kind = socket.AF_INET6 if ":" in address else socket.AF_INET
            if family in (socket.AF_UNSPEC, kind):
                numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV  # so that nothing resolves it again
                here = {"hostname": host, "host": address, "port": port, "family": kind, "proto": 0, "flags": numeric}
                found.append(here)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, f"{host} has no address")
        return found

    async def close(self) -> None:
        """Nothing is kept open."""


def checked_socket(allow_private: bool) -> Callable[[tuple[Any, ...]], socket.socket]:
    """Makes aiohttp's sockets: the last check, of the address that is about to be connected to. Raises Refused."""

    def make(info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        check_address(str(address[0]), str(address[0]), allow_private)
        return socket.socket(family, kind, protocol)

    return make
