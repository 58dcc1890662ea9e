"""Local copies of remote files within a bound in bytes, shared by the processes of one machine."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline import storage

_COPY = re.compile("[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}\.(\d+)\.part")  # a copy under way, and how large it will be
_LOCK = ".lock"
_POLL_S = 0.02


@dataclass(frozen=True)
class FileCache:
    """Copies in `folder`, together at most `limit_bytes`; the ones used longest ago go first.

    Several processes and threads may share the folder: one fetches a file, the others wait for it. A file half
    fetched by a process that died is removed. The bound covers copies under way too, but not a copy that was
    thrown out while a reader still has it open. Whatever else lies in the folder is neither counted nor touched.
    """

    folder: Path
    limit_bytes: int

    def open(self, path: str, sha256: str = "") -> BinaryIO:
        """The file at `path`, open for reading; it stays readable when its copy is thrown out meanwhile.

        With its `sha256` (hex) the content is checked as it arrives and the service is not asked again; without it
        the service is asked each time whether the file changed. Raises OSError when it cannot be fetched or is not
        what it should be, ValueError when it is larger than the whole cache.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        version = sha256 or storage.info(path).version
        name = hashlib.sha256(f"{path}\0{version}".encode()).hexdigest()
        size = -1
        while True:
            if (file := self._copy(name)) is not None:
                return file
            size = storage.info(path).size if size < 0 else size
            if size > self.limit_bytes:
                raise ValueError(f"{path} has {size} bytes, the cache {self.folder} at most {self.limit_bytes}")
            with self._locked():
                part = self._reserve(name, size)
            if part is None:
                time.sleep(_POLL_S)
            else:
                self._fetch(path, sha256, part)

    def _copy(self, name: str) -> BinaryIO | None:
        with suppress(FileNotFoundError):
            file = (self.folder / name).open("rb")
            os.utime(file.fileno())  # the time of its last use
            return file
        return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / _LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, name: str, size: int) -> "tuple[Path, BinaryIO] | None":
        """Room for a file that this process shall now fetch; None while another does, or until others are done.

        A file under way is NAME.SIZE.part, locked by the process that fetches it for as long as that lives.
        """
        if (self.folder / name).exists():
            return None
        used = size
        copies: list[tuple[int, int, Path]] = []
        for entry in self.folder.iterdir():
            if part_name := _PART.fullmatch(entry.name):
                if _is_abandoned(entry):
                    entry.unlink(missing_ok=True)  # gone when its fetch ended just now
                    continue
                used += int(part_name[1])
                if entry.name.startswith(name):
                    return None
            elif _COPY.fullmatch(entry.name):
                stat = entry.stat()
                copies.append((stat.st_mtime_ns, stat.st_size, entry))
        used += sum(held for _, held, _ in copies)
        for _, held, copy in sorted(copies):
            if used <= self.limit_bytes:
                break
            copy.unlink()
            used -= held
        if used > self.limit_bytes:
            return None
        part = self.folder / f"{name}.{size}.part"
        file = part.open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return part, file

    def _fetch(self, path: str, sha256: str, reserved: tuple[Path, BinaryIO]) -> None:
        part, lock = reserved
        with lock:
            try:
                storage.download(path, part)
                if sha256:
                    with part.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != sha256:
                        raise OSError(f"{path} is damaged: its sha256 is {found}, not {sha256}")
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            # From here on the name of the part may be another's, who fetches the file anew after it was thrown out.
            os.replace(part, self.folder / part.name.split(".")[0])


def _is_abandoned(part: Path) -> bool:
    """Whether nobody fetches it any more."""
    with suppress(FileNotFoundError, BlockingIOError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
