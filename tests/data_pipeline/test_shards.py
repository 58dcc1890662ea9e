"""Shards: what is written is what is read, by us and by webdataset; every damage is named."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from data_pipeline.build import BuildConfig, build
from data_pipeline.ledger import read_ledger
from data_pipeline.reader import ShardReader
from data_pipeline.resize import resize_crop
from data_pipeline.shards import Entry, Info, RawSample, Tar, write_index, write_tar
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.shapes import ShapesConfig, ShapesSource
from data_pipeline.verify import verify


def test_delivers_every_sample_of_the_source_in_order(source: FolderSource, dataset: ShardReader) -> None:
    assert len(dataset) == len(source) == dataset.info.samples
    assert [s.samples for s in dataset.info.shards] == [10, 10, 10, 7]
    for i in range(len(source)):
        given, stored = source[i], dataset[i]
        assert (stored.key, stored.captions, stored.meta) == (given.key, given.captions, given.meta)
        picture = Image.open(io.BytesIO(stored.image_bytes))
        assert picture.tobytes() == resize_crop(given.image, 16).tobytes()


def test_webdataset_reads_the_same_samples(dataset: ShardReader) -> None:
    urls = [f"{dataset.path}/{s.file}" for s in dataset.info.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == len(dataset)
    for theirs, ours in zip(read, (dataset[i] for i in range(len(dataset))), strict=True):
        assert theirs["__key__"] == ours.key
        assert theirs["png"] == ours.image_bytes
        assert theirs["txt"].decode() == ours.captions[0]
        assert json.loads(theirs["json"]) == {"captions": list(ours.captions), **ours.meta}


def test_tar_bytes_depend_on_content_only(tmp_path: Path) -> None:
    entries = [Entry("a", {"png": b"1" * 512, "txt": b""}), Entry("b", {"png": b"2" * 513})]
    (tmp_path / "x").mkdir()
    first = write_tar(tmp_path / "0.tar", entries)
    os.utime(tmp_path)
    assert write_tar(tmp_path / "x" / "1.tar", iter(entries)) == first
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "x" / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        members = {m.name: (m.offset_data, m.size) for m in tar}
    places = {f"{s['key']}.{e}": tuple(p[:2]) for s in first.samples for e, p in s["members"].items()}
    assert places == members
    assert sorted(os.listdir(tmp_path)) == ["0.tar", "x"]


def test_no_entries_no_file(tmp_path: Path) -> None:
    assert write_tar(tmp_path / "0.tar", []) == Tar([], 0, "")
    assert not list(tmp_path.iterdir())


def _first(dataset: ShardReader, results: "multiprocessing.Queue[RawSample]") -> None:
    results.put(dataset[11])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_in_another_process(dataset: ShardReader, method: str) -> None:
    expected = dataset[11]  # also opens the file here
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=_first, args=(dataset, results))
    child.start()
    assert results.get(timeout=60) == expected
    child.join()
    assert pickle.loads(pickle.dumps(dataset))[11] == expected


def test_keeps_few_files_open(dataset: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.reader._OPEN_FILES", 2)
    keys = [dataset[i].key for i in (0, 10, 20, 30, 0)]
    assert keys[0] == keys[4] and len(dataset._files) == 2
    dataset.close()
    assert dataset[0].key == keys[0]


@pytest.mark.parametrize("index", [-1, 37])
def test_index_outside(dataset: ShardReader, index: int) -> None:
    with pytest.raises(IndexError):
        dataset[index]


@pytest.fixture
def copy(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "copy"))


def test_every_flipped_byte_of_a_member_is_named(copy: Path) -> None:
    dataset = ShardReader(copy)
    sample = json.loads((copy / "00001.json").read_bytes())["samples"][3]
    tar = copy / "00001.tar"
    whole = tar.read_bytes()
    for extension, (offset, size, _) in sample["members"].items():
        for at in (offset, offset + size // 2, offset + size - 1):
            tar.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(RuntimeError, match=rf"00001\.tar.*{sample['key']}\.{extension}"):
                dataset.read(13, [extension])
            assert [line.partition(":")[0] for line in verify(copy)] == ["00001.tar"]
    tar.write_bytes(whole)
    assert verify(copy) == [] and dataset[13].key == sample["key"]


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 5000, -512, -1])
def test_truncated_shard(copy: Path, keep: int) -> None:
    tar = copy / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"00002\.tar has \d+ bytes instead of \d+"):
        ShardReader(copy)


def test_shard_cut_while_open(copy: Path) -> None:
    dataset = ShardReader(copy)
    os.truncate(copy / "00000.tar", 600)
    with pytest.raises(RuntimeError, match=r"00000\.tar is damaged at"):
        dataset[0]


def test_header_damage_is_found_by_verifying(copy: Path) -> None:
    tar = bytearray((copy / "00003.tar").read_bytes())
    tar[100] ^= 1  # in the first header: no member changes, but webdataset would stop here
    (copy / "00003.tar").write_bytes(tar)
    assert [line.partition(":")[0] for line in verify(copy)] == ["00003.tar"]


def test_missing_shard_and_damaged_indexes(copy: Path) -> None:
    (copy / "00002.json").write_bytes((copy / "00002.json").read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(RuntimeError, match=r"00002\.json is damaged"):
        ShardReader(copy)[25]
    (copy / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"00001\.tar is missing"):
        ShardReader(copy)
    index = (copy / "index.json").read_bytes()
    for bad in (index.replace(b'"samples": 37', b'"samples": 27'), index[:-9], b"", b"[]", b"\xff"):
        (copy / "index.json").write_bytes(bad)
        with pytest.raises(ValueError, match=r"index\.json is missing or damaged"):
            ShardReader(copy)


def test_not_a_shard_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder .*nowhere; build one with: ldm data build"):
        ShardReader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not a shard folder; build one with: ldm data build"):
        ShardReader(tmp_path)


def test_zero_samples(tmp_path: Path) -> None:
    write_index(tmp_path, Info(0, 0, None, "png", {}, ()))
    with pytest.raises(ValueError, match="holds no samples"):
        ShardReader(tmp_path)


def test_other_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.shards.VERSION", 99)
        write_index(tmp_path, Info(0, 0, None, "png", {}, ()))
    with pytest.raises(ValueError, match="ldm-shards version 99; this program reads ldm-shards versions 1 and 2"):
        ShardReader(tmp_path)


def rewritten(names: list[str], contents: dict[str, bytes]) -> bytes:
    """A tar of these members, as another tool would write it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            data = contents[name]
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def damages(tar: Path, sample: dict[str, Any]) -> dict[str, bytes]:
    """13 ways in which webdataset 1.0.2 was seen to lose or alter samples, most of them without an error."""
    whole = tar.read_bytes()
    image, size, _ = sample["members"]["png"]
    first = min(place[0] for place in sample["members"].values()) - 512
    with tarfile.open(tar) as opened:
        members = {m.name: opened.extractfile(m).read() for m in opened}  # type: ignore[union-attr]
    names = list(members)
    text = sample["members"]["txt"][0]

    def renamed(rename: Callable[[str], str]) -> bytes:
        return rewritten([rename(n) for n in names], {rename(n): data for n, data in members.items()})

    return {
        "cut inside a picture": whole[: image + size // 2],
        "cut at a header": whole[: image - 300],
        "cut between two samples": whole[:first],
        "a header byte flipped": whole[: first + 5] + bytes([whole[first + 5] ^ 1]) + whole[first + 6 :],
        "zeros inside": whole[:first] + bytes(1024) + whole[first:],
        "a payload byte flipped": whole[: image + 9] + bytes([whole[image + 9] ^ 1]) + whole[image + 10 :],
        "empty": b"",
        "a key twice": rewritten(names[:3] + names[:3] + names[6:], members),
        "all pictures, then all texts": rewritten(sorted(names, key=lambda n: n[-3:]), members),
        "a dot in a key": renamed(lambda name: name.replace("-", ".", 1)),
        "a path for a key": renamed(lambda name: f"../../{name}"),
        "a caption in Latin-1": whole[:text] + b"\xe9" + whole[text + 1 :],
        "another compression": gzip.compress(whole),
    }


def test_13_kinds_of_damage_are_named(copy: Path) -> None:
    sample = read_ledger(copy / "00001.json").samples[3]
    tar = copy / "00001.tar"
    whole, found = tar.read_bytes(), damages(tar, sample)
    assert len(found) == 13
    for kind, data in found.items():
        tar.write_bytes(data)
        said = verify(copy)
        assert said and all(line.startswith("00001.tar: ") for line in said), kind
    tar.write_bytes(found["a payload byte flipped"])
    assert verify(copy) == [f"00001.tar: row 13, {sample['key']}: png damaged"]
    tar.write_bytes(found["a header byte flipped"])
    assert verify(copy) == [f"00001.tar: row 13, {sample['key']}: header of png damaged"]
    tar.unlink()
    assert verify(copy) == ["00001.tar: is missing"]
    tar.write_bytes(whole)
    assert verify(copy) == []
    (copy / "00002.json").unlink()
    assert verify(copy) == ["00002.json: is missing"]


def mutate(folder: Path, chance: random.Random) -> Path:
    """One random change to one file: bytes flipped, cut, inserted, doubled, zeroed, swapped; or the file is gone."""
    path = chance.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    kind = chance.randrange(8)
    if kind == 0:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[a:]
    elif kind == 2:
        del data[a:b]
    elif kind == 3:
        data[a:a] = chance.randbytes(chance.choice((1, 16, 512, 1024)))
    elif kind == 4:
        data[a:b] = bytes(b - a)
    elif kind == 5:
        data += data[a:b] or b"x"
    elif kind == 6:
        data[a:b] = data[a:b][::-1]
    else:
        path.unlink()
        return path
    path.write_bytes(data)
    return path


def delivered(folder: Path, expected: list[RawSample]) -> bool:
    """Read everything. True when all is as written; False when the damage was named. Anything else fails."""
    try:
        dataset = ShardReader(folder)
        got = [dataset[i] for i in range(len(dataset))]
        dataset.close()
    except (ValueError, RuntimeError) as error:
        assert str(folder) in str(error)
        return False
    assert got == expected
    return True


def test_1000_random_mutations_are_named_or_harmless(tmp_path: Path) -> None:
    """Delivered + rejected = written, or the damage is named. In a child, so that nothing can take the tests along."""
    folder = tmp_path / "whole"
    build(ShapesSource(ShapesConfig(count=7)), BuildConfig(size=32, samples_per_shard=4), folder)
    for other in ("build.json", "report.json"):  # no sample depends on them
        (folder / other).unlink()
    dataset = ShardReader(folder)
    expected = [dataset[i] for i in range(len(dataset))]
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            named = check_mutations(folder, files, expected)
            status = 0 if named > 900 else 2  # the rest changed nothing, or only what no sample needs
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def check_mutations(folder: Path, files: dict[str, bytes], expected: list[RawSample]) -> int:
    chance = random.Random(0)
    named = 0
    for _ in range(1000):
        path = mutate(folder, chance)
        same = path.exists() and path.read_bytes() == files[path.name]
        whole = delivered(folder, expected)
        try:
            said = verify(folder)
        except ValueError as error:
            said = [str(error)]
        assert bool(said) != same, path  # every byte counts
        assert whole or said
        assert all(path.name in line for line in said[:1])
        named += bool(said)
        path.write_bytes(files[path.name])
    return named
