"""Remote files: every operation in memory and against a local S3 server, and the bounded cache of copies."""

import hashlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from data_pipeline import storage
from data_pipeline.filecache import FileCache
from data_pipeline.sources.opening import open_source
from tests.data_pipeline.makers import described, png


@pytest.fixture(params=["disk", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return str(tmp_path / "data") if request.param == "disk" else f"memory://{tmp_path.name}"


def test_operations(folder: str, tmp_path: Path) -> None:
    path = storage.join(folder, "a/b.bin")
    assert not storage.exists(path) and not storage.is_folder(folder)
    for ask in (storage.info, storage.read, lambda p: storage.read_range(p, 0, 1)):
        with pytest.raises(FileNotFoundError, match=r"b\.bin"):
            ask(path)
    storage.write(path, b"first")
    before = storage.info(path)
    data = bytes(range(256)) * 5
    storage.write(path, data)
    after = storage.info(path)
    assert (before.name, before.size, after.size) == ("b.bin", 5, 1280) and before.version != after.version
    assert storage.exists(path) and storage.exists(storage.join(folder, "a")) and storage.is_folder(folder)
    assert not storage.is_folder(path) and storage.parent(path) == storage.join(folder, "a")
    assert storage.read(path) == data and storage.read_range(path, 250, 10) == data[250:260]
    assert storage.read_range(path, 1270, 10) == data[1270:] and storage.read_range(path, 5, 0) == b""
    for offset, size in ((1275, 10), (5000, 1)):
        with pytest.raises(OSError, match=r"b\.bin"):
            storage.read_range(path, offset, size)
    with storage.open_read(path) as file:
        file.seek(300)
        assert file.read(4) == data[300:304] and file.seek(0, os.SEEK_END) == 1280
    local = tmp_path / "local.bin"
    local.write_bytes(data * 3)
    storage.upload(local, storage.join(folder, "c.bin"))
    storage.write(storage.join(folder, ".hidden/x"), b"x")
    storage.write(storage.join(folder, "a/.y"), b"x")
    storage.write(storage.join(folder, "a-b"), b"x")
    listed = storage.list_files(folder)
    assert [(f.name, f.size) for f in listed] == [("a-b", 1), ("a/b.bin", 1280), ("c.bin", 3840)]
    assert listed[1].version == storage.info(path).version
    copy = tmp_path / "copy.bin"
    storage.download(storage.join(folder, "c.bin"), copy)
    assert copy.read_bytes() == data * 3
    storage.remove(path)
    storage.remove(path)
    assert not storage.exists(path) and len(storage.list_files(folder)) == 2


def test_the_disk_never_shows_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = tmp_path / "x", tmp_path / "source"
    target.write_bytes(b"old")
    source.write_bytes(b"new")

    def stopped(*_: object) -> None:
        assert target.read_bytes() == b"old"
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", stopped)
    for act in (lambda: storage.write(target, b"new"), lambda: storage.upload(source, target)):
        with pytest.raises(OSError, match="disk full"):
            act()
    assert target.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["source", "x"]


@pytest.mark.parametrize("path", ["file:///etc/passwd", "pipe://x", "s3://a::zip://b", "ftp://host/x", "://x"])
def test_unknown_schemes_are_refused(path: str) -> None:
    for ask in (storage.read, storage.exists, storage.list_files, storage.remove):
        with pytest.raises(ValueError, match=r"remote paths are s3://, gs://"):
            ask(path)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (package, f"fsspec.implementations.{'http' if package == 'aiohttp' else scheme}"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, scheme, raising=False)
    with pytest.raises(ValueError, match=rf"^{scheme}:// needs the package {package}; .*pip install {package}$"):
        storage.read(f"{scheme}://host/x")


def test_every_failure_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def cat_file(self, path: str) -> bytes:
            raise self.error

        info = cat_file

    broken = Broken()
    monkeypatch.setattr(storage, "_filesystem", lambda path: (broken, path))
    for error, kind in ((KeyError("no credentials"), OSError), (PermissionError(), PermissionError)):
        broken.error = error
        with pytest.raises(kind, match="s3://b/k"):
            storage.read("s3://b/k")
        with pytest.raises(kind):
            storage.exists("s3://b/k")  # not a quiet no


@pytest.mark.slow
def test_a_source_on_s3(bucket: str, tmp_path: Path) -> None:
    for root in (str(tmp_path), f"{bucket}/source"):
        for number in range(3):
            storage.write(f"{root}/sub/{number}.png", png(number))
            storage.write(f"{root}/sub/{number}.txt", f"number {number}".encode())
    here, there = open_source(str(tmp_path)), open_source(f"{bucket}/source")
    assert described(there) == described(here) and len(here) == 3
    with pytest.raises(FileNotFoundError):
        storage.list_files("s3://no-such-bucket/x")


def test_cache_keeps_its_bound(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1000)
    for name in "abcd":
        storage.write(f"memory://bound/{name}", name.encode() * 400)

    def fetch(name: str) -> bytes:
        with cache.open(f"memory://bound/{name}") as file:
            return file.read()

    held = lambda: {p.read_bytes()[:1] for p in cache.folder.iterdir() if p.suffix == "" and p.name != ".lock"}  # noqa: E731
    for name in "ab":
        assert fetch(name) == name.encode() * 400
    time.sleep(0.01)
    fetch("a")  # now b was used longest ago
    kept_open = cache.open("memory://bound/b")
    time.sleep(0.01)
    fetch("a")
    fetch("c")
    assert held() == {b"a", b"c"}
    assert kept_open.read() == b"b" * 400  # thrown out, still readable
    storage.write("memory://bound/a", b"changed")
    assert fetch("a") == b"changed"
    storage.write("memory://bound/big", b"x" * 1001)
    with pytest.raises(ValueError, match=r"1001 bytes, the cache .* at most 1000"):
        fetch("big")


def test_cache_leaves_other_files_alone(tmp_path: Path) -> None:
    """They are neither thrown out nor counted, whatever they are called."""
    folder = tmp_path / "cache"
    (folder / "sub.part").mkdir(parents=True)
    others = {name: folder / name for name in ("thesis.txt", "x.part", "a.b.part", "sub.part/deep", "f" * 63, "F" * 64)}
    for name, path in others.items():
        path.write_bytes(name.encode() * 1000)
    cache = FileCache(folder, 1000)
    for name in "abc":
        storage.write(f"memory://others/{name}", name.encode() * 600)
        assert cache.open(f"memory://others/{name}").read() == name.encode() * 600
    assert all(path.read_bytes() == name.encode() * 1000 for name, path in others.items())
    assert len(list(folder.iterdir())) == 6 + 2  # the lock and the last copy


def test_cache_checks_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FileCache(tmp_path / "cache", 1000)
    storage.write("memory://hash/a", b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    with pytest.raises(OSError, match="memory://hash/a is damaged: its sha256 is 3a6eb0"):
        cache.open("memory://hash/a", "0" * 64)
    assert [p.name for p in cache.folder.iterdir()] == [".lock"]
    assert cache.open("memory://hash/a", digest).read() == b"data"
    monkeypatch.setattr(storage, "_filesystem", None)  # the service is not asked again
    assert cache.open("memory://hash/a", digest).read() == b"data"


def test_cache_of_many_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 readers of 6 files in room for 2: each reading is right, the bound holds, no file is fetched by two at once."""
    folder, under_way, peak = tmp_path / "cache", [], []
    data = {f"memory://many/{n}": bytes([n]) * 1000 for n in range(6)}
    for path, content in data.items():
        storage.write(path, content)
    download: Callable[..., None] = storage.download

    def slow(path: str, file: Path) -> None:
        assert path not in under_way
        under_way.append(path)
        time.sleep(0.005)
        download(path, file)
        held = 0
        for entry in list(folder.iterdir()):
            with suppress(FileNotFoundError):
                held += entry.stat().st_size
        peak.append(held)
        under_way.remove(path)

    monkeypatch.setattr(storage, "download", slow)

    def work(seed: int) -> bool:
        cache = FileCache(folder, 2000)
        order = [(seed * 7 + k * (seed % 5 + 1)) % 6 for k in range(20)]
        return all(cache.open(f"memory://many/{n}").read() == bytes([n]) * 1000 for n in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert max(peak) <= 2000


def test_cache_outlives_a_killed_fetch(tmp_path: Path) -> None:
    """A process is killed in the middle of a fetch; the next one removes its part and fetches anew."""
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from data_pipeline import filecache, storage\n"
        "def dies(path, file):\n"
        "    Path(file).write_bytes(b'half'); os._exit(9)\n"
        "storage.download = dies\n"
        "filecache.FileCache(Path(sys.argv[1]), 150).open(sys.argv[2])\n"
    )
    folder = tmp_path / "cache"
    killed = subprocess.run([sys.executable, "-c", code, folder, source], timeout=60, check=False)
    assert killed.returncode == 9 and any(p.suffix == ".part" for p in folder.iterdir())
    assert FileCache(folder, 150).open(str(source)).read() == b"x" * 100
    assert not any(p.suffix == ".part" for p in folder.iterdir())


def test_links_and_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.png").write_bytes(b"x")
    assert [(f.name, f.size) for f in storage.list_files(tmp_path)] == [("a.png", 0), ("loop.png", 0), ("sub/b.png", 1)]
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # not by its mode, which does not bind root
    with pytest.raises(PermissionError, match="sub"):
        storage.list_files(tmp_path)
