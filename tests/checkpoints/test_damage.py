"""Damaged checkpoints of a real run: each one is refused by name, and the one before is used."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.checkpoints.files import newest_valid, verify
from ldm.training.run import run
from tests.conftest import tiny_config

Damage = Callable[[Path, random.Random], None]


def some(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))


def flip(folder: Path, rng: random.Random) -> None:
    path = some(folder, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(folder: Path, rng: random.Random) -> None:
    path = some(folder, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def empty(folder: Path, rng: random.Random) -> None:
    some(folder, rng).write_bytes(b"")


def lose(folder: Path, rng: random.Random) -> None:
    some(folder, rng).unlink()


def lengthen(folder: Path, rng: random.Random) -> None:
    with some(folder, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 100)))


def exchange(folder: Path, rng: random.Random) -> None:
    """Two files with each other's content."""
    one, two = some(folder, rng), some(folder, rng)
    while one.read_bytes() == two.read_bytes():
        two = some(folder, rng)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def from_before(folder: Path, rng: random.Random) -> None:
    """A file of another checkpoint."""
    path = some(folder, rng)
    other = folder.parent / "step-00000002" / path.relative_to(folder)
    while path.read_bytes() == other.read_bytes():
        path = some(folder, rng)
        other = folder.parent / "step-00000002" / path.relative_to(folder)
    shutil.copy(other, path)


def other_config(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(p for p in folder.rglob("*.json") if p.name != "manifest.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": rng.randrange(100, 1000)}))


def shorter_list(folder: Path, rng: random.Random) -> None:
    """A manifest that does not tell of a file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[rng.choice(sorted(manifest))]
    (folder / "manifest.json").write_text(json.dumps(manifest))


KINDS: tuple[Damage, ...] = (
    flip, cut, empty, lose, lengthen, exchange, from_before, other_config, shorter_list,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(tiny_config("autoencoder", out, shards))
    return out / "checkpoints"


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_every_damage_is_refused_by_name(count: int, checkpoints: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    for i in range(count):
        copy = shutil.copytree(checkpoints, tmp_path / str(i))
        newest = copy / "step-00000004"
        KINDS[i % len(KINDS)](newest, rng)
        with pytest.raises(ValueError, match=re.escape(str(newest))):
            verify(newest)
        assert newest_valid(copy) == copy / "step-00000002"
        shutil.rmtree(copy)
