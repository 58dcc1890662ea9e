"""What the sources share: a picture's bytes from where a row says they are, and a sample made from them."""

import errno
import hashlib
import os
import re
import stat
from typing import Any

from data_pipeline import storage
from data_pipeline.images import MAX_BYTES, read_image
from data_pipeline.sources import Rejected, Sample

_KEY = re.compile(r"[0-9a-z_-]{1,80}")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def file_key(name: str) -> str:
    """A relative path -> a key: readable, plus 16 digits of its hash, so that different paths never meet.

    At most 60 + 1 + 16 = 77 characters. With 64 bits, the chance that any two of 10^8 paths meet is 3e-4.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{_slug(name.rpartition('.')[0])}-{digest}".lstrip("-")


def row_key(value: Any, table: str, index: int) -> str:
    """A row's own key where it will do as one; else made from it; without one, from the table's name and the number."""
    if value is None or value == "":
        return f"{_slug(table)[-60:]}-{index:09d}".lstrip("-")
    text = str(value)
    return text if _KEY.fullmatch(text) else file_key(f"{text}.")


def picture_bytes(value: Any, folder: str, *, allow_remote: bool = False) -> bytes:
    """The encoded picture that a row holds, or whose path (relative to `folder`) it holds. Raises Rejected.

    OSError when a disk or service fails: that says nothing about the row.
    """
    if isinstance(value, dict):  # as `datasets` stores pictures
        value = value.get("bytes") or value.get("path")
    if value is None or value == "" or value == b"":
        raise Rejected("missing image")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Rejected("missing image", f"{type(value).__name__}, neither bytes nor a path")
    if value.lower().startswith(("http://", "https://")):
        raise Rejected("not fetched", f"{value[:200]} is an address; run ldm data fetch first")
    if storage.is_remote(value) and not allow_remote:
        raise Rejected("remote path", f"{value[:200]} (allow_remote=true reads it)")
    return read_picture(storage.join(folder, value))


def read_picture(path: str) -> bytes:
    """All of a picture's file. Raises Rejected; OSError when a disk or service fails."""
    try:
        if not storage.is_remote(path):
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # /dev/zero has no end, a pipe no beginning
                raise Rejected("missing image", "not a regular file")
            if found.st_size > MAX_BYTES:
                raise Rejected("file too large", f"{found.st_size} bytes, at most {MAX_BYTES}")
        return storage.read(path)
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise Rejected("missing image") from error
        if error.errno in _OUT_OF_REACH:
            raise Rejected("unreadable file", str(error)) from error
        raise
    except ValueError as error:  # a NUL in a path, an unknown scheme
        raise Rejected("unreadable file", str(error)) from error


def make_sample(key: str, data: bytes, captions: tuple[str, ...], meta: dict[str, Any], max_pixels: int) -> Sample:
    """Decode a picture; its meta gets its size in pixels and the sha256 of its encoded bytes. Raises Rejected."""
    decoded = read_image(data, max_pixels)
    known: dict[str, Any] = {
        "width": decoded.image.width,
        "height": decoded.image.height,
        "format": decoded.format,
        "sha256": decoded.sha256,
    }
    if decoded.notes:
        known["notes"] = list(decoded.notes)
    return Sample(key, decoded.image, captions, {**meta, **known})


def _slug(text: str) -> str:
    return re.sub(r"[^0-9a-z]+", "-", text.lower()).strip("-")[-60:]
