"""The members of a tar that someone else wrote, by offset, and every place where it is not whole.

Readers of tar stop without a word at the first block they do not understand. This one names the place and goes on at
the next header that its checksum proves. Nothing is ever extracted: names are data, not paths.

What cannot be seen here: a byte changed inside a member. A tar has checksums of its headers only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_ZERO_BLOCK = b"\0" * BLOCK
_MAGIC, _MAGIC_AT = b"ustar", 257
_CHUNK = 1 << 20
_MAX_NAME = 1 << 16  # bytes of an extended header
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
    b"S": "sparse file",
}
_REGULAR = (b"0", b"\0", b"7")
_OCTAL = re.compile(rb"[0-7]+")
_RECORD = re.compile(rb"(\d+) ([^=]+)=")


@dataclass(frozen=True)
class Member:
    """A member: `size` bytes from `offset` on. `flaw`: why its bytes are not to be had; "" for a whole plain file."""

    name: str
    offset: int
    size: int
    flaw: str = ""


@dataclass(frozen=True)
class Damage:
    """Byte `offset` and after: `detail` says what is wrong there."""

    offset: int
    detail: str


@dataclass(frozen=True)
class _Header:
    name: bytes
    size: int
    kind: bytes
    extended: bool  # old GNU sparse files: more header blocks follow


def members(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """What a tar of `size` bytes holds, in order. Folders are left out; nothing at all is yielded for an empty tar."""
    at, ended = 0, False
    renamed: dict[str, bytes] = {}  # what extended headers say of the member after them
    first = _at(file, 0, 6)
    if packed := next((name for magic, name in _COMPRESSED.items() if first.startswith(magic)), ""):
        yield Damage(0, f"compressed with {packed}: unpack it first")
        return
    while at < size and not ended:
        block = _at(file, at, BLOCK)
        header = _parse(block)
        if header is None:
            following = _next_header(file, at, size)
            if following < 0 and block == _ZERO_BLOCK[: len(block)] and _is_zero(file, at, size):
                if size - at < 2 * BLOCK:
                    yield Damage(at, f"cut short: {size - at} bytes of the end mark")
                ended = True
            else:
                what = "zero bytes inside" if block == _ZERO_BLOCK else "no header where one belongs"
                lost = (size if following < 0 else following) - at
                yield Damage(at, f"{what}: {lost} bytes passed over")
                at, ended, renamed = following, following < 0, {}
            continue
        begin = at + BLOCK
        while header.extended and begin < size and _at(file, begin, BLOCK)[504:505] == b"\1":
            begin += BLOCK
        begin += BLOCK * header.extended
        if header.kind in (b"x", b"X", b"g", b"L", b"K"):
            more = _extended(header, _at(file, begin, min(header.size, _MAX_NAME)))
            if more is None:
                yield Damage(at, "an extended header that cannot be read")
                more = {}
            renamed |= more if header.kind != b"g" else {}
            at = begin + _padded(header.size)
            continue
        member = _member(header, begin, size, renamed)
        renamed = {}
        if member.flaw == "cut short":
            yield member
            yield Damage(at, f"cut short: {max(0, size - begin)} of {member.size} bytes of {member.name!r}")
            following = _next_header(file, begin, size)
            at, ended = following, following < 0
            continue
        if header.kind != b"5":
            yield member
        at = begin + _padded(member.size if header.kind in _REGULAR or header.kind == b"S" else 0)
    if not ended and size:
        yield Damage(size, "cut short: no end mark")


def _member(header: _Header, begin: int, size: int, renamed: dict[str, bytes]) -> Member:
    name = renamed.get("path", header.name).decode("utf-8", "surrogateescape")
    length = int(renamed["size"]) if "size" in renamed else header.size
    if header.kind in _REGULAR:
        flaw = "sparse file" if "sparse" in renamed else ""
    else:
        flaw = _KINDS.get(header.kind, "" if header.kind == b"5" else f"member of type {header.kind!r}")
    holds_data = header.kind in _REGULAR or header.kind == b"S"
    return Member(name, begin, length, "cut short" if holds_data and begin + length > size else flaw)


def _parse(block: bytes) -> _Header | None:
    """A header, or None: not one, by its checksum (the sum of its bytes, the checksum's own as spaces)."""
    if len(block) < BLOCK:
        return None
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if checksum is None or size is None or checksum != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        return None
    name, kind = block[:100].split(b"\0")[0], block[156:157]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(name, size, kind, kind == b"S" and block[482:483] == b"\1")


def _number(field: bytes) -> int | None:
    """An octal number, or GNU's binary one for large files; None when it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0")[0].strip()
    if not text:
        return 0
    return int(text, 8) if _OCTAL.fullmatch(text) else None


def _extended(header: _Header, data: bytes) -> dict[str, bytes] | None:
    """What a GNU long name or a PAX header says: path, size, sparse; None when it cannot be read."""
    if len(data) < header.size:
        return None
    if header.kind in (b"L", b"K"):
        return {"path": data.rstrip(b"\0")} if header.kind == b"L" else {}
    found: dict[str, bytes] = {}
    at = 0
    while at < len(data) and data[at : at + 1] != b"\0":
        record = _RECORD.match(data, at)
        end = at + int(record[1]) if record and len(record[1]) < 8 else 0
        if record is None or not record.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            return None
        key, value = record[2].decode("utf-8", "replace"), data[record.end() : end - 1]
        if key.startswith("GNU.sparse"):
            found["sparse"] = value
        elif key == "path" or (key == "size" and value.isdigit() and len(value) < 19):
            found[key] = value
        elif key == "size":
            return None
        at = end
    return found


def _next_header(file: BinaryIO, start: int, size: int) -> int:
    """Where the next header begins, at byte `start` or later and on any byte; -1 without one."""
    at = start
    while at < size:
        chunk = _at(file, at, _CHUNK + BLOCK)
        place = chunk.find(_MAGIC)
        while place >= 0:
            begin = at + place - _MAGIC_AT
            if begin >= start and _parse(_at(file, begin, BLOCK)):
                return begin
            place = chunk.find(_MAGIC, place + 1)
        at += _CHUNK
    return -1


def _is_zero(file: BinaryIO, start: int, size: int) -> bool:
    return all(not any(_at(file, at, _CHUNK)) for at in range(start, size, _CHUNK))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
