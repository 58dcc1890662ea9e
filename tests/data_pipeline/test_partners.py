"""Paired pictures and masks: from the source through the shards to the batch, cut as the picture is."""

import io
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from data_pipeline.batch import Batch
from data_pipeline.build import BuildConfig, build
from data_pipeline.copying import merge, split
from data_pipeline.images import read_image, read_opacity
from data_pipeline.ledger import read_ledger
from data_pipeline.loader import DataConfig, Loader, fixed_batch, open_data
from data_pipeline.reader import ShardReader
from data_pipeline.remove import take_out
from data_pipeline.sources.folder import FolderConfig, FolderSource
from data_pipeline.sources.table import TableConfig, TableSource
from data_pipeline.transforms import Frame, cut_mask
from data_pipeline.verify import verify
from tests.data_pipeline.makers import verdicts
from tests.data_pipeline.test_cache import make_cache

COUNT = 9
CUT = DataConfig("", size=24, flip=True, crops=3, condition="stored", mask="stored")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise pictures of several shapes, without any symmetry; the condition is the picture, the mask its red."""
    root = tmp_path_factory.mktemp("paired")
    rng = np.random.default_rng(0)
    for name in ("pictures", "conditions", "masks"):
        (root / name / "deep").mkdir(parents=True)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (40 + i, 60 - 2 * i, 3), dtype=np.uint8)
        name = f"deep/{i}" if i % 2 else f"{i}"
        Image.fromarray(pixels).save(root / "pictures" / f"{name}.png")
        (root / "pictures" / f"{name}.txt").write_text(f"picture {i}")
        Image.fromarray(pixels).save(root / "conditions" / f"{name}.bmp")  # another suffix
        Image.fromarray(pixels[..., 0]).save(root / "masks" / f"{name}.png")
    return root


def opened(root: Path, **more: Any) -> FolderSource:
    given = {"conditions": str(root / "conditions"), "masks": str(root / "masks"), **more}
    return FolderSource(FolderConfig(str(root / "pictures"), **given))


@pytest.fixture(scope="module")
def kept(root: Path) -> Path:
    build(opened(root), BuildConfig(samples_per_shard=4), root / "kept")
    return root / "kept"


def take(config: DataConfig, count: int = 3, batch_size: int = 6) -> list[Batch]:
    return list(itertools.islice(Loader(open_data(config), config, batch_size=batch_size, seed=1), count))


@pytest.mark.parametrize("size", [None, 32, 50])
def test_shards_hold_them_cut_as_the_picture(root: Path, tmp_path: Path, size: int | None) -> None:
    build(opened(root), BuildConfig(size=size, samples_per_shard=4), tmp_path)
    assert verify(tmp_path) == []
    reader = ShardReader(tmp_path)
    for i in range(COUNT):
        members = reader.read(i, reader.extensions(i))
        assert list(members) and set(members) == {"png", "condition.png", "mask.png", "txt", "json"}
        image, condition, mask = (Image.open(io.BytesIO(members[n])) for n in ("png", "condition.png", "mask.png"))
        assert condition.tobytes() == image.tobytes() and (condition.mode, mask.mode) == ("RGB", "L")
        assert condition.size == mask.size == image.size
        if size is None:
            assert mask.tobytes() == image.getchannel("R").tobytes()


@pytest.mark.parametrize("config", [CUT, replace(CUT, crops=0), replace(CUT, buckets=True, bucket_step=8, size=32)])
def test_cut_and_mirrored_as_the_picture(kept: Path, config: DataConfig) -> None:
    """Equal before the cut, so equal after it; the pictures have no symmetry that would hide a wrong frame."""
    batches = take(replace(config, path=str(kept)), 6)
    for batch in batches:
        assert batch.condition is not None and batch.mask is not None
        assert torch.allclose(batch.condition * 2 - 1, batch.image, atol=1e-6)
        assert batch.condition.dtype == torch.float32 and batch.mask.shape == batch.image[:, :1].shape
        # Of noise, Lanczos and the mean over the area differ; what lies elsewhere is not alike at all.
        red = batch.condition[:, :1]
        for ours, theirs, other in zip(batch.mask, red, red.flip(-1), strict=True):
            assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.6
            assert abs(np.corrcoef(ours.ravel(), other.ravel())[0, 1]) < 0.4
    plain = take(replace(config, path=str(kept), condition="", mask=""), 6)
    assert all(torch.equal(a.image, b.image) for a, b in zip(batches, plain, strict=True))
    assert plain[0].condition is None and plain[0].mask is None


def test_masks_become_means_of_areas() -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8)
    mask = Image.fromarray(values)
    ours = np.asarray(cut_mask(mask, Frame(4, 0, 12, 12), (4, 3)))
    expected = values[:, 4:16].reshape(3, 4, 4, 3).mean((1, 3))
    assert np.abs(ours - expected).max() <= 1  # two roundings of a half
    mirrored = np.asarray(cut_mask(mask, Frame(4, 0, 12, 12, mirrored=True), (4, 3)))
    assert np.array_equal(mirrored, ours[:, ::-1])
    white = Image.new("L", (17, 11), 255)
    assert np.asarray(cut_mask(white, Frame(0, 0, 17, 11), (5, 23))).min() == 255


def test_stored_masks_are_of_the_centred_square(tmp_path: Path) -> None:
    """30 x 20 px at 10: columns 5 to 24, means of 2 x 2; exact but for two roundings of a half."""
    values = np.random.default_rng(2).integers(0, 256, (20, 30), dtype=np.uint8)
    for folder in ("pictures", "masks"):
        (tmp_path / folder).mkdir()
        Image.fromarray(values).save(tmp_path / folder / "a.png")
    build(opened(tmp_path, conditions="", caption="a"), BuildConfig(size=10), tmp_path / "out")
    stored = Image.open(io.BytesIO(ShardReader(tmp_path / "out").read(0, ("mask.png",))["mask.png"]))
    expected = values[:, 5:25].reshape(10, 2, 10, 2).mean((1, 3))
    assert np.abs(np.asarray(stored) - expected).max() <= 1


def test_a_cache_keeps_them_in_its_frame(kept: Path, tmp_path: Path) -> None:
    """With latents from a cache pictures are not read, what lies beside them is: in the frame of the latents."""
    reader = ShardReader(kept)
    config = replace(CUT, path=str(kept), size=16)
    make_cache(tmp_path / "cache", reader)
    cached = take(replace(config, cache=str(tmp_path / "cache")))
    for ours, plain in zip(cached, take(config), strict=True):
        assert ours.image.shape == (6, 3, 0, 0) and ours.moments is not None
        assert ours.condition is not None and plain.condition is not None
        assert torch.equal(ours.condition, plain.condition) and torch.equal(ours.mask, plain.mask)
    made = take(replace(config, cache=str(tmp_path / "cache"), condition="edges"))
    for ours, plain in zip(made, take(replace(config, condition="edges")), strict=True):
        assert ours.image.shape == (6, 3, 0, 0) and torch.equal(ours.condition, plain.condition)


def test_batches_carry_them_along(kept: Path) -> None:
    (batch,) = take(replace(CUT, path=str(kept)), 1)
    again = Batch.cat(batch.split(3))
    for name in ("image", "condition", "mask"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    assert batch.to("meta").mask.device.type == "meta"
    with pytest.raises(ValueError, match="of which only some have mask"):
        Batch.cat([batch, replace(batch, mask=None)])
    fixed = fixed_batch(ShardReader(kept), replace(CUT, path=str(kept)), 4)
    assert torch.allclose(fixed.condition * 2 - 1, fixed.image, atol=1e-6) and fixed.mask.shape == (4, 1, 24, 24)


def test_workers_change_nothing(kept: Path) -> None:
    config = replace(CUT, path=str(kept))
    for ours, plain in zip(take(replace(config, workers=2)), take(config), strict=True):
        assert torch.equal(ours.condition, plain.condition) and torch.equal(ours.mask, plain.mask)


def test_changing_folders_keeps_them(root: Path, kept: Path, tmp_path: Path) -> None:
    reader = ShardReader(kept)
    copy = Path(shutil.copytree(kept, tmp_path / "copy"))
    take_out(copy, {reader.key(2): ("removed on request", "")})
    split(copy, (tmp_path / "a", tmp_path / "b"), count=3)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert verify(tmp_path / "c") == []
    merged = ShardReader(tmp_path / "c")
    before = {reader.key(i): reader.read(i, reader.extensions(i)) for i in range(COUNT)}
    after = {merged.key(i): merged.read(i, merged.extensions(i)) for i in range(COUNT - 1)}
    assert after.items() <= before.items()
    build(opened(root, masks=""), BuildConfig(), tmp_path / "other")
    with pytest.raises(ValueError, match=r"png condition\.png mask\.png; .*other: original size png condition\.png\)"):
        merge([tmp_path / "c", tmp_path / "other"], tmp_path / "d")


def test_damage_is_named(kept: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(kept, tmp_path / "copy"))
    row = read_ledger(copy / "00000.json").samples[1]
    tar = bytearray((copy / "00000.tar").read_bytes())
    tar[row["members"]["mask.png"][0] + 20] ^= 1
    (copy / "00000.tar").write_bytes(tar)
    assert verify(copy) == [f"00000.tar: row 1, {row['key']}: mask.png damaged"]
    reader = ShardReader(copy)
    with pytest.raises(RuntimeError, match=r"damaged at .*\.mask\.png"):
        reader.read(1, ("mask.png",))


def test_a_folder_without_them_is_refused_at_opening(root: Path, kept: Path, tmp_path: Path) -> None:
    build(opened(root, conditions="", masks=""), BuildConfig(), tmp_path / "plain")
    for kind in ("condition", "mask"):
        config = DataConfig([str(kept), str(tmp_path / "plain")], size=16, **{kind: "stored"})
        with pytest.raises(
            ValueError, match=rf"plain holds no {kind}s: build it again with them, or set data\.{kind}="
        ):
            Loader(open_data(config), config, batch_size=2, seed=0)
    for wrong, said in (({"condition": "canny"}, "stored, edges, segments"), ({"mask": "edges"}, "allowed is stored")):
        config = DataConfig(str(kept), size=16, **wrong)
        with pytest.raises(ValueError, match=said):
            Loader(open_data(config), config, batch_size=2, seed=0)


def test_what_lacks_a_partner_is_rejected_by_name(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "pictures", tmp_path / "pictures")
    shutil.copytree(root / "conditions", tmp_path / "pictures" / "conditions")  # inside: no pictures of their own
    shutil.copytree(root / "masks", tmp_path / "masks")
    conditions = tmp_path / "pictures" / "conditions"
    (conditions / "0.bmp").unlink()
    (conditions / "2.bmp").write_bytes(b"not a picture")
    Image.new("RGB", (10, 10)).save(conditions / "4.bmp")
    (tmp_path / "masks" / "6.png").unlink()
    source = opened(tmp_path, conditions=str(conditions))
    assert len(source) == COUNT
    said = verdicts(source)
    assert (said["0.png"], said["2.png"], said["6.png"]) == ("missing condition", "unusable condition", "missing mask")
    report = build(source, BuildConfig(size=16), tmp_path / "out")
    assert report is not None and report.delivered == COUNT - 4
    assert set(report.rejected) == {
        "missing condition", "unusable condition", "condition of another shape", "missing mask",
    }  # fmt: skip
    ledger = read_ledger(tmp_path / "out" / "00000.json")
    assert {r["name"]: r["detail"] for r in ledger.rejected}["4.png"] == "10 x 10 for 52 x 44"


def test_partners_of_another_scale(tmp_path: Path) -> None:
    """Half as large (rounded), and still of the picture's size in the shards."""
    for folder, size, mode in (
        ("pictures", (45, 31), "RGB"),
        ("conditions", (23, 15), "RGB"),
        ("masks", (22, 16), "1"),
    ):
        (tmp_path / folder).mkdir()
        Image.new(mode, size, "white").save(tmp_path / folder / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a")
    for size in (None, 16):
        build(opened(tmp_path), BuildConfig(size=size), tmp_path / f"out{size}")
        members = ShardReader(tmp_path / f"out{size}").read(0, ("png", "condition.png", "mask.png"))
        pictures = [Image.open(io.BytesIO(data)) for data in members.values()]
        assert {p.size for p in pictures} == {(size, size) if size else (45, 31)}
        assert np.asarray(pictures[2]).min() == 255


def test_the_alpha_channel_as_mask(tmp_path: Path) -> None:
    """Opaque = learn; without the channel all counts; turned upright with the picture."""
    alpha = np.random.default_rng(0).integers(0, 256, (8, 12), dtype=np.uint8)
    rgba = np.dstack([np.full((8, 12, 3), 90, np.uint8), alpha])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(rgba).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(rgba[..., :3]).save(tmp_path / "b.png")
    source = FolderSource(FolderConfig(str(tmp_path), masks="alpha", caption="one for all"))
    first, second = source[0], source[1]
    assert first.captions == ("one for all",) and first.image.size == (8, 12)
    assert np.array_equal(np.asarray(first.mask), np.rot90(alpha, -1))
    assert np.asarray(second.mask).min() == 255 and second.mask.size == (12, 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "webp"])
def test_opacity_is_what_the_background_shows(mode: str) -> None:
    """By another way: on white and on black a pixel differs by exactly what shows through, 255 - opacity."""
    rng = np.random.default_rng(4)
    alpha = rng.integers(0, 256, (9, 7), dtype=np.uint8)
    image = Image.fromarray(np.dstack([rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), alpha]))
    buffer = io.BytesIO()
    if mode == "webp":
        image.save(buffer, "WEBP", lossless=True, exact=True)
    elif mode in ("P", "PA", "L", "RGB"):  # one clear colour, by number; none in the last two
        plain = image.convert("RGB").convert(mode.rstrip("A"))
        plain.save(buffer, "PNG", **({"transparency": plain.getpixel((2, 3))} if mode.startswith("P") else {}))
    else:
        image.convert(mode).save(buffer, "PNG")
    data = buffer.getvalue()
    white, black = (np.asarray(read_image(data, background=(v, v, v)).image).astype(int) for v in (255, 0))
    opacity = np.asarray(read_opacity(data)).astype(int)
    assert np.abs((white - black) - (255 - opacity)[..., None]).max() <= 1  # two roundings
    assert (opacity.min() == 255) == (mode in ("L", "RGB"))


def test_bad_folders(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder '/no/such' of masks"):
        opened(root, masks="/no/such")
    with pytest.raises(ValueError, match="folder of conditions, has no pictures"):
        opened(root, conditions=str(tmp_path))
    for suffix in ("png", "webp"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"0.{suffix}")
    with pytest.raises(ValueError, match=r"0\.png and 0\.webp would be conditions of the same picture"):
        opened(root, conditions=str(tmp_path))


def test_a_changed_partner_is_noticed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "masks", tmp_path / "masks")
    before = opened(root, masks=str(tmp_path / "masks")).fingerprint
    assert opened(root, masks=str(tmp_path / "masks")).fingerprint == before
    Image.new("L", (60, 40)).save(tmp_path / "masks" / "0.png")
    assert opened(root, masks=str(tmp_path / "masks")).fingerprint != before


def test_columns_of_a_table(root: Path, tmp_path: Path) -> None:
    """Instruction, picture before and picture after: as paths, and as bytes inside the table."""
    names = [p.relative_to(root / "pictures").as_posix() for p in sorted((root / "pictures").rglob("*.png"))]
    rows = [
        {"after": f"pictures/{n}", "before": f"conditions/{n[:-4]}.bmp", "how": "make it so", "where": f"masks/{n}"}
        for n in names
    ]
    rows.append({**rows[0], "before": ""})
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"condition_column": "before", "mask_column": "where", "caption_columns": ("how",)}
    source = TableSource(TableConfig(str(root / "pairs.jsonl"), path_column="after", **settings))
    for i in range(COUNT):
        sample = source[i]
        assert sample.captions == ("make it so",) and sample.condition.tobytes() == sample.image.tobytes()
        assert sample.mask.tobytes() == sample.image.getchannel("R").tobytes()
    report = build(source, BuildConfig(size=16), tmp_path / "out")
    assert report is not None and {r: f.count for r, f in report.rejected.items()} == {"missing condition": 1}
    columns = {"after": [(root / rows[0]["after"]).read_bytes()], "before": [(root / rows[0]["before"]).read_bytes()]}
    parquet.write_table(pa.table({**columns, "how": ["go"]}), tmp_path / "pairs.parquet")
    config = TableConfig(
        str(tmp_path / "pairs.parquet"), image_column="after", condition_column="before", caption_columns=("how",)
    )
    assert TableSource(config)[0].condition.tobytes() == source[0].condition.tobytes()
    with pytest.raises(ValueError, match="has no column 'earlier'; it has after, before, how"):
        TableSource(replace(config, condition_column="earlier"))
