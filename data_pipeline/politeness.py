"""Good manners towards the hosts that are fetched from: turns, waiting when asked, and a refusal that is heard."""

import asyncio
import email.utils
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

OPTED_OUT = ("noai", "noimageai", "noindex", "noimageindex", "none")  # none = noindex, nofollow


class Failed(Exception):
    """One try came to nothing. `wait_s`: how long the host asks to be left alone."""

    def __init__(self, reason: str, detail: str, retryable: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.retryable, self.wait_s = reason, detail, retryable, wait_s


def retry_after(value: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, as number or as HTTP date (RFC 9110, 10.2.3); 0 if unreadable.

    `now` is the time of day in seconds since 1970.
    """
    if re.fullmatch(r"[0-9]+", value.strip()):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, OverflowError, TypeError):
        return 0.0


def opted_out(headers: Iterable[str], user_agent: str) -> str:
    """The directive of some X-Robots-Tag header that forbids use of the picture; "" when none does.

    `noai, nofollow` is meant for all, `some-bot: noai` for that agent: ours when `user_agent` names it as a product.
    """
    ours = {"*", *re.findall(r"([a-z][\w.-]*)/", user_agent.lower()), user_agent.lower()}
    for header in headers:
        agent = "*"
        for part in header.lower().split(","):
            # A name holds no space: the colons in `unavailable_after: 25 Jun 2027 15:00:00 GMT` name nobody.
            named = re.fullmatch(r"\s*([\w.*-]+)\s*:(.*)", part)
            if named and not re.match(r"unavailable_after|max-", named[1]):
                agent, part = named[1], named[2]
            if agent in ours and part.strip() in OPTED_OUT:
                return part.strip()
    return ""


@dataclass
class _Gate:
    """One host: how many may be inside, and when (on the loop's clock) the next may go in."""

    slots: asyncio.Semaphore
    door: asyncio.Lock = field(default_factory=asyncio.Lock)
    free_at: float = 0.0
    users: int = 0


class Hosts:
    """Turns: at most `concurrency` in all, `per_host` at one host, `delay_s` between two starts there."""

    def __init__(self, concurrency: int, per_host: int, delay_s: float, longest_wait_s: float) -> None:
        self._everyone = asyncio.Semaphore(concurrency)
        self._per_host = per_host
        self._delay = delay_s
        self._longest_wait = longest_wait_s
        self._gates: dict[str, _Gate] = {}
        self._sweep_at = 4096

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Wait for a turn at `host`. Raises Failed when it asked for more than `longest_wait_s` of quiet."""
        gate = self._gate(host)
        gate.users += 1
        try:
            async with gate.slots:
                async with gate.door:
                    while (wait := gate.free_at - time.monotonic()) > 0:
                        if wait > max(self._longest_wait, self._delay):
                            raise Failed("host asks to wait", f"{host}: {wait:.0f} s more", True, wait)
                        await asyncio.sleep(wait)
                    await self._everyone.acquire()
                    gate.free_at = time.monotonic() + self._delay
                try:
                    yield
                finally:
                    self._everyone.release()
        finally:
            gate.users -= 1

    def hold(self, host: str, seconds: float) -> None:
        """Nobody goes to `host` for so long."""
        gate = self._gate(host)
        gate.free_at = max(gate.free_at, time.monotonic() + seconds)

    def _gate(self, host: str) -> _Gate:
        if host not in self._gates:
            if len(self._gates) >= self._sweep_at:
                now = time.monotonic()
                self._gates = {h: g for h, g in self._gates.items() if g.users or g.free_at > now}
                self._sweep_at = max(4096, 2 * len(self._gates))
            self._gates[host] = _Gate(asyncio.Semaphore(self._per_host))
        return self._gates[host]
