"""Files that appear whole or not at all: written under a hidden name, flushed to the disk, then renamed.

Every operation that changes the disk goes through `operate`, so that a test can count them and let any one fail.
"""

import hashlib
import io
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

_BUFFER = 1 << 20  # bytes gathered before they are handed to the operating system
_STAGED = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


def operate(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Do one operation on the disk: open, write, fsync, rename or remove."""
    return function(*arguments)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, whatever happens."""
    with StagedFile(path) as file:
        file.write(data)


class StagedFile:
    """A new file that takes the name `path` at the end of a `with` block, and leaves no trace when that raises.

    `size` and `sha256` are those of what was written so far. Its hidden name is its own: two processes that write
    the same file do not meet, and the later one wins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self.size = 0
        self._digest = hashlib.sha256()
        self._raw: io.FileIO = operate("open", _RawFile, self.staged, "xb")
        self._file = io.BufferedWriter(self._raw, _BUFFER)

    def write(self, data: bytes) -> None:
        """Append."""
        self._digest.update(data)
        self.size += len(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        """Hex digest of all that was written."""
        return self._digest.hexdigest()

    def commit(self) -> None:
        """Flush to the disk, take the final name, and flush the name too."""
        self._file.flush()
        operate("fsync", os.fsync, self._raw.fileno())
        self._raw.close()
        operate("rename", os.replace, self.staged, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            operate("fsync", os.fsync, folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Forget it. Closes the file below the buffer, which would try to write once more to a full disk."""
        self._raw.close()
        self.staged.unlink(missing_ok=True)

    def __enter__(self) -> "StagedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and not self._raw.closed:
                self.commit()
        finally:
            self.discard()


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    operate("remove", path.unlink, True)


def staged_for(file: str) -> str | None:
    """The final name of a file that some process has prepared or left behind as `file`; None for other names."""
    match = _STAGED.fullmatch(file)
    return match[1] if match else None


class _RawFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        written: int = operate("write", super().write, data)
        return written
