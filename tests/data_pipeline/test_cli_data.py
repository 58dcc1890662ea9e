"""`ldm data`: from the command line to shards that read, and everything done with them."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.reader import ShardReader
from ldm.cli.data import app
from ldm.cli.data.build import read_part


def ldm_data(*arguments: object) -> str:
    """Run the command; returns what it wrote, raises what it raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def copy(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "copy"))


def test_shapes(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    said = ldm_data("build", "shapes", out, "--size", "48", "count=12", "seed=1")
    assert out in said and "delivered" in said and "12 samples" in said and "12 of 12 samples" in said
    dataset = ShardReader(tmp_path / "out")
    assert (dataset.info.size, len(dataset)) == (48, 12)
    assert dataset.info.source["settings"]["size"] == 48  # drawn at 48, not enlarged to it
    said = ldm_data("info", out)
    assert "12 in 1 shards" in said and "48 x 48 px" in said and "count=12" in said
    assert "every byte is as it was written" in ldm_data("verify", out)


def test_drawn_sources_know_their_size(tmp_path: Path) -> None:
    ldm_data("build", "shapes", tmp_path, "count=2", "size=40")
    assert ShardReader(tmp_path).info.size == 40


def test_folder_and_filters(pictures: Path, tmp_path: Path) -> None:
    said = ldm_data("build", pictures, tmp_path / "out", "filters.min_side_px=21")
    dataset = ShardReader(tmp_path / "out")
    assert dataset.info.size is None and len(dataset) < 37 and "min_side_px" in said
    assert "original size" in ldm_data("info", tmp_path / "out")


def test_paired_pictures_and_masks(pictures: Path, tmp_path: Path) -> None:
    ldm_data("build", pictures, tmp_path / "out", "--size", 16, f"conditions={pictures}", "masks=alpha")
    assert "png, 16 x 16 px, condition, mask" in ldm_data("info", tmp_path / "out")
    with pytest.raises(ValueError, match="no folder '/no/such' of masks"):
        ldm_data("build", pictures, tmp_path / "other", "masks=/no/such")


def test_parts_and_index(tmp_path: Path) -> None:
    made = ("build", "shapes", tmp_path / "out", "count=6", "--samples-per-shard", "2", "--part")
    assert "part 2/2 is there" in ldm_data(*made, "2/2")
    with pytest.raises(ValueError, match="2 of 3 shards"):
        ldm_data("index", tmp_path / "out")
    assert "6 samples" in ldm_data(*made, "1/2")
    (tmp_path / "out" / "index.json").unlink()
    assert "6 samples" in ldm_data("index", tmp_path / "out")


def test_damage_is_named(copy: Path) -> None:
    tar = copy / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    result = CliRunner().invoke(app, ["verify", str(copy)])
    assert "00000.tar: the end, after the last sample, is damaged" in result.output
    assert isinstance(result.exception, ValueError) and "damaged in 1 places" in str(result.exception)


def test_looking(copy: Path, tmp_path: Path) -> None:
    assert str(copy / "report.html") in ldm_data("report", copy)
    assert "picture number" in (copy / "report.html").read_text()
    assert json.loads((copy / "report.json").read_text())["delivered"] == 37
    ldm_data("preview", copy, tmp_path / "sheet.png", "--count", 4)
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
    assert "ready to train" in ldm_data("doctor", copy, "--batch", 2, "--ranks", 2)
    with pytest.raises(ValueError, match="1 errors and"):
        ldm_data("doctor", copy, "--batch", 64)
    ShardReader(copy)  # the report's files do not disturb


def test_changing(copy: Path, tmp_path: Path) -> None:
    first = ShardReader(copy)[0].key
    (tmp_path / "list").write_text(f"# please\n{first}\nunknown\n")
    said = ldm_data("remove", copy, "--keys", tmp_path / "list", "--dry-run")
    assert "1 samples would go" in said and len(ShardReader(copy)) == 37
    said = ldm_data("remove", copy, "--keys", tmp_path / "list")
    assert "1 samples are out" in said and "not here, or were removed before: unknown" in said
    assert len(ShardReader(copy)) == 36
    assert "0 samples would go" in ldm_data("dedupe", copy, "--dry-run")
    assert "12 samples" in ldm_data("split", copy, tmp_path / "a", tmp_path / "b", "--count", 12)
    assert "36 samples" in ldm_data("merge", tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert "every byte" in ldm_data("verify", tmp_path / "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shpaes"], "unknown source 'shpaes'"),
        (["/no/such"], "unknown source '/no/such'"),
        (["shapes", "cuont=3"], "'?cuont'?.*(?i:did you mean).*count"),
        (["shapes", "filters.min_side=3"], "min_side"),
        (["shapes", "--image-format", "tiff"], "image_format='tiff'"),
        (["shapes", "--executor", "cloud"], "executor='cloud'"),
        (["shapes", "--part", "3/2"], "--part 3/2: write I/N"),
        (["shapes", "--size", "0"], "size"),
    ],
)
def test_mistakes_in_building(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ldm_data("build", arguments[0], str(tmp_path / "out"), *arguments[1:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "no folder nowhere"),
        (["report", "nowhere"], "no folder nowhere"),
        (["report", "nowhere", "--out", "page.pdf"], "ends in .html"),
        (["preview", "nowhere", "x.png"], "no folder nowhere"),
        (["preview", "nowhere", "x.jpg"], "ends in .png"),
        (["index", "nowhere"], "no build of shards started there"),
        (["remove", "nowhere"], "name what is to go"),
        (["merge", "one", "two"], "2 folders or more"),
        (["split", "nowhere", "a", "b", "--share", "0.5"], "no folder nowhere"),
        (["dedupe", "nowhere"], "no folder nowhere"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ldm_data(*arguments)


def test_parts_are_read() -> None:
    assert read_part("3/16") == (3, 16)
    for wrong in ("", "3", "0/4", "5/4", "a/b", "1/", "-1/2", "1/2/3"):
        with pytest.raises(ValueError, match="write I/N"):
            read_part(wrong)
