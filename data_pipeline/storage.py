"""Files here or far away by one set of operations: a path with `://` goes through fsspec, any other to the disk.

Remote paths: s3://, gs://, hf://, http(s):// (reading only) and memory:// (this process only, for tests). Where a
service is and who we are to it is told the usual way, as in AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, HF_TOKEN or
~/.aws. An object appears under its name whole or not at all: here by durable.py, in an object store by the service.
So a folder whose index is written last is complete when the index is there.

Every failure far away is an OSError that names the path: FileNotFoundError when nothing is there.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline import durable

StrPath = str | os.PathLike[str]

PACKAGES = {  # scheme -> what fsspec needs for it
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "memory": "fsspec",
}
_BLOCK = 4 << 20  # bytes fetched at a time by `open_read`
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime", "created")


@dataclass(frozen=True)
class FileInfo:
    """A file of a folder: its name relative to that folder (with /), its size in bytes, and what changes with it."""

    name: str
    size: int
    version: str


def is_remote(path: StrPath) -> bool:
    """Whether it has a scheme, as in s3://bucket/key."""
    return "://" in os.fspath(path)


def join(folder: StrPath, name: str) -> str:
    """`name` below `folder`; an absolute or remote `name` stands for itself."""
    if is_remote(name):
        return name
    return f"{os.fspath(folder).rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def within(folder: StrPath, outer: StrPath) -> str:
    """The path of a folder inside another one, with a / at the end; "" when it is not inside."""
    if is_remote(folder) or is_remote(outer):
        inner, around = os.fspath(folder), os.fspath(outer).rstrip("/") + "/"
    else:
        inner, around = os.path.realpath(folder), os.path.join(os.path.realpath(outer), "")
    return inner.rstrip("/").removeprefix(around) + "/" if inner.startswith(around) else ""


def parent(path: StrPath) -> str:
    """The folder that a file is in."""
    return os.fspath(path).rpartition("/")[0] if is_remote(path) else os.path.dirname(path) or "."


def basename(path: StrPath) -> str:
    """The last part of a path."""
    return os.fspath(path).rstrip("/").rpartition("/")[2]


def stem(path: StrPath) -> str:
    """The last part of a path up to its last dot."""
    name = basename(path)
    return name.rpartition(".")[0] or name


def exists(path: StrPath) -> bool:
    """Whether a file or folder is there; a service that cannot be asked is an OSError, not a no."""
    if not is_remote(path):
        return os.path.exists(path)
    try:
        _info(path)
    except FileNotFoundError:
        return False
    return True


def is_folder(path: StrPath) -> bool:
    """Whether it is a folder; in an object store, whether any object lies below it."""
    if not is_remote(path):
        return os.path.isdir(path)
    try:
        return str(_info(path)["type"]) == "directory"
    except FileNotFoundError:
        return False


def info(path: StrPath) -> FileInfo:
    """Size and version of one file; its name is the last part of the path. FileNotFoundError without one."""
    return _described(basename(path), _info(path)) if is_remote(path) else _stat(basename(path), os.stat(path))


def list_files(folder: StrPath) -> list[FileInfo]:
    """All files below `folder`, sorted by name; what is hidden (any part with a leading dot) is left out.

    Links to files count as files, also those with nothing behind them (size 0), so that reading says what is missing;
    links to folders are not followed. Raises OSError for a folder that cannot be listed.
    """
    if is_remote(folder):
        fs, root = _filesystem(folder)
        with _named(folder):
            found = fs.find(root, detail=True)
        named = [(path[len(root.rstrip("/")) + 1 :], entry) for path, entry in found.items()]
        files = [_described(name, entry) for name, entry in named if name and not name.endswith("/")]
        return sorted((f for f in files if not f"/{f.name}".count("/.")), key=lambda f: f.name)
    files = []
    for at, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [f for f in folders if not f.startswith(".")]
        within = os.path.relpath(at, folder).replace(os.sep, "/") + "/"
        prefix = "" if within == "./" else within
        files += [_listed(prefix + n, os.path.join(at, n)) for n in names if not n.startswith(".")]
    return sorted(files, key=lambda f: f.name)


def open_read(path: StrPath) -> BinaryIO:
    """A file to read and seek in; far away, some MB are fetched at a time."""
    if not is_remote(path):
        return open(path, "rb")
    fs, inner = _filesystem(path)
    with _named(path):
        opened: BinaryIO = fs.open(inner, "rb", block_size=_BLOCK)
    return opened


def read(path: StrPath) -> bytes:
    """All of a file."""
    if not is_remote(path):
        return Path(path).read_bytes()
    fs, inner = _filesystem(path)
    with _named(path):
        return bytes(fs.cat_file(inner))


def read_range(path: StrPath, offset: int, size: int) -> bytes:
    """`size` bytes from byte `offset` on, exactly; OSError when the file has fewer."""
    if not size:
        return b""
    if is_remote(path):
        fs, inner = _filesystem(path)
        with _named(path):
            data = bytes(fs.cat_file(inner, start=offset, end=offset + size))
    else:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        # The disk gives less at the end of a file; a web server that ignores ranges gives all of it.
        raise OSError(f"{os.fspath(path)}: {len(data)} bytes for the {size} bytes from byte {offset} on")
    return data


def write(path: StrPath, data: bytes) -> None:
    """Write a file, or replace it; nobody ever sees a part of it."""
    if not is_remote(path):
        os.makedirs(parent(path), exist_ok=True)
        durable.write_atomically(Path(path), data)
        return
    fs, inner = _filesystem(path)
    with _named(path):
        fs.pipe_file(inner, data)


def upload(file: Path, path: StrPath) -> None:
    """Copy a finished local file to `path`; nobody ever sees a part of it. OSError when fewer bytes arrived."""
    if not is_remote(path):
        os.makedirs(parent(path), exist_ok=True)
        with file.open("rb") as source, durable.StagedFile(Path(path)) as copy:
            while block := source.read(_BLOCK):
                copy.write(block)
        return
    fs, inner = _filesystem(path)
    with _named(path):
        fs.put_file(str(file), inner)
    arrived, size = info(path).size, file.stat().st_size
    if arrived != size:
        raise OSError(f"{os.fspath(path)}: {arrived} of {size} bytes arrived")


def download(path: StrPath, file: Path) -> None:
    """Copy a file to the local `file`, in place; OSError when fewer bytes arrived than it has."""
    expected = info(path).size
    if is_remote(path):
        fs, inner = _filesystem(path)
        with _named(path):
            fs.get_file(inner, str(file))
    else:
        with open(path, "rb") as source, file.open("wb") as copy:
            while block := source.read(_BLOCK):
                copy.write(block)
    if file.stat().st_size != expected:
        raise OSError(f"{os.fspath(path)}: {file.stat().st_size} of {expected} bytes arrived")


def remove(path: StrPath) -> None:
    """Remove a file, if it is there."""
    if not is_remote(path):
        durable.remove(Path(path))
        return
    fs, inner = _filesystem(path)
    with suppress(FileNotFoundError), _named(path):
        fs.rm_file(inner)


def _filesystem(path: StrPath) -> tuple[Any, str]:
    """fsspec's file system for a remote path and the path inside it. ValueError, one line, where there is none.

    Asked anew each time: fsspec keeps one per process, and what a fork inherits must not be used.
    """
    text = os.fspath(path)
    scheme = text.partition("://")[0]
    if scheme not in PACKAGES or "::" in text:  # `::` chains file systems, among them ones that run or unpack
        known = ", ".join(f"{s}://" for s in PACKAGES)
        raise ValueError(f"{text!r}: remote paths are {known}; local ones are given without a scheme")
    try:
        import fsspec

        fs = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        package = PACKAGES[scheme]
        raise ValueError(f"{scheme}:// needs the package {package}; get it with: pip install {package}") from error
    return fs, str(fs._strip_protocol(text))


@contextmanager
def _named(path: StrPath) -> Iterator[None]:
    """Whatever a service's client raises, as an OSError with the path; clients have hundreds of exceptions."""
    text = os.fspath(path)
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text) from error
    except PermissionError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text) from error
    except Exception as error:
        raise OSError(f"{text}: {type(error).__name__}: {error}") from error


def _info(path: StrPath) -> dict[str, Any]:
    fs, inner = _filesystem(path)
    with _named(path):
        found: dict[str, Any] = fs.info(inner)
    return found


def _described(name: str, entry: dict[str, Any]) -> FileInfo:
    changing = next((entry[k] for k in _VERSIONS if entry.get(k)), "")
    moment = changing.timestamp() if isinstance(changing, datetime) else changing
    return FileInfo(name, int(entry.get("size") or 0), f"{entry.get('size')}-{moment}")


def _raise(error: OSError) -> None:
    raise error


def _listed(name: str, path: str) -> FileInfo:
    try:
        return _stat(name, os.stat(path))
    except OSError:
        if not os.path.islink(path):
            raise
        return FileInfo(name, 0, "no file behind the link")


def _stat(name: str, stat: os.stat_result) -> FileInfo:
    return FileInfo(name, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")
