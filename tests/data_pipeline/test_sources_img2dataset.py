"""What img2dataset writes, made by hand: every row of its tables delivered or rejected by name."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from webdataset import TarWriter

from data_pipeline.sources.img2dataset import Img2datasetConfig, Img2datasetSource
from tests.data_pipeline.makers import check_random_access, described, png, verdicts

FAILED = {2: ("failed_to_download", "HTTP Error 404: Not Found"), 3: ("failed_to_resize", "Image decoding error")}


def write_shard(folder: Path, shard: int, count: int = 5, *, captions: bool = True) -> None:
    """NNNNN.tar, .parquet and _stats.json of `count` rows; rows 2 and 3 failed."""
    rows: list[dict[str, Any]] = []
    with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
        for i in range(count):
            status, error = FAILED.get(i, ("success", None))
            key = f"{shard:05d}{i:04d}"
            row = {
                "url": f"http://h/{key}", "caption": f"caption {key}", "key": key, "status": status,
                "error_message": error, "width": 6, "height": 5, "exif": '{"GPSInfo": "here"}', "similarity": 0.25,
            }  # fmt: skip
            rows.append(row)
            if status == "success":
                text = {"txt": row["caption"]} if captions else {}
                writer.write({"__key__": key, "jpg": png(i), "json": row, **text})
    parquet.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    stats = {"count": count, "successes": count - 2, "failed_to_download": 1, "failed_to_resize": 1}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(3):
        write_shard(tmp_path, shard, captions=shard != 1)
    return tmp_path


def opened(folder: Path) -> Img2datasetSource:
    return Img2datasetSource(Img2datasetConfig(path=str(folder)))


def expected(shard: int) -> dict[str, Any]:
    names = {f"http://h/{shard:05d}{i:04d}": (f"caption {shard:05d}{i:04d}",) for i in range(5)}
    failed = {2: "failed to download", 3: "failed to resize"}
    return {name: failed.get(i, caption) for i, (name, caption) in enumerate(names.items())}


def test_every_row_of_the_tables(folder: Path) -> None:
    source = opened(folder)
    assert verdicts(source) == expected(0) | expected(1) | expected(2)
    rows = described(source)
    assert rows[2] == ("http://h/000000002", "failed to download", "HTTP Error 404: Not Found")
    name, key, captions, meta, _ = rows[5]
    assert (name, key, captions) == ("http://h/000010000", "000010000", ("caption 000010000",))
    assert meta["url"] == name and meta["scores"] == {"similarity": 0.25} and "GPS" not in json.dumps(meta)
    check_random_access(source, folder)


def test_without_tables(folder: Path) -> None:
    with_tables = described(opened(folder))
    for path in folder.glob("*.parquet"):
        path.unlink()
    kept = [r for r in with_tables if len(r) == 5]
    found = described(opened(folder))
    assert [(r[1], r[2], r[3]["url"], r[4]) for r in found] == [(r[1], r[2], r[3]["url"], r[4]) for r in kept]


def test_half_written_shards(folder: Path) -> None:
    before = opened(folder).fingerprint
    (folder / "00001_stats.json").unlink()
    (folder / "00001.parquet").unlink()
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[: len(data) // 2])
    (folder / "00002.tar").unlink()
    source = opened(folder)
    assert source.fingerprint != before
    found = verdicts(source)
    assert {k: v for k, v in found.items() if k in expected(0)} == expected(0)
    half = {k: v for k, v in found.items() if k.startswith("00001.tar/")}
    assert (
        set(half.values()) <= {"unfinished shard", "cut short", "damaged tar"} and "unfinished shard" in half.values()
    )
    assert [found[name] for name in expected(2)] == [
        "missing in tar", "missing in tar", "failed to download", "failed to resize", "missing in tar",
    ]  # fmt: skip
    for path in folder.glob("*_stats.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no NNNNN_stats\.json: not finished.*webdataset:"):
        opened(folder)
    with pytest.raises(ValueError, match="no folder"):
        opened(folder / "none")


def test_what_the_table_does_not_say(folder: Path) -> None:
    """Rows dropped without an entry, a sample that no row names, a damaged table and damaged statistics."""
    table = parquet.read_table(folder / "00000.parquet")
    parquet.write_table(table.slice(0, 4), folder / "00000.parquet")
    found = verdicts(opened(folder))
    assert found["00000.tar"] == "dropped by img2dataset" and found["00000.tar/000000004"] == ("caption 000000004",)
    assert len(found) == 5 + 1 + 10
    (folder / "00000_stats.json").write_text("{}")
    assert verdicts(opened(folder))["00000.tar"] == "unreadable metadata"
    (folder / "00001.parquet").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"00001\.parquet cannot be read"):
        opened(folder)


def test_shards_in_several_folders_share_no_key(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name, 0)
    source = opened(tmp_path)
    keys = [key for _, key, *_ in described(source) if key.startswith(("a-", "b-"))]
    assert len(keys) == len(set(keys)) == 6
