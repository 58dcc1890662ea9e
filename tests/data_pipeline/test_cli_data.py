"""`ldm data`: from the command line to shards that read."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.shards import ShardDataset
from ldm.cli.data import app


def ldm_data(*arguments: str) -> str:
    """Run the command; returns what it wrote to stdout, raises what it raised."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_shapes(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    said = ldm_data("build", "shapes", out, "--size", "48", "count=12", "seed=1")
    assert out in said and "delivered" in said and "12 samples" in said and "12 of 12 samples" in said
    dataset = ShardDataset(tmp_path / "out")
    assert (dataset.info.size, len(dataset)) == (48, 12)
    assert dataset.info.source["settings"]["size"] == 48  # drawn at 48, not enlarged to it
    said = ldm_data("info", out, "--verify")
    assert "12 in 1 shards" in said and "48 x 48 px" in said and "count=12" in said and "verified" in said


def test_drawn_sources_know_their_size(tmp_path: Path) -> None:
    ldm_data("build", "shapes", str(tmp_path), "count=2", "size=40")
    assert ShardDataset(tmp_path).info.size == 40


def test_folder(pictures: Path, tmp_path: Path) -> None:
    said = ldm_data("build", str(pictures), str(tmp_path / "out"), "min_side_px=21")
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.info.size is None and len(dataset) < 37 and "too small" in said
    assert "original size" in ldm_data("info", str(tmp_path / "out"))


def test_damage_is_named(shard_folder: Path, tmp_path: Path) -> None:
    ldm_data("build", "shapes", str(tmp_path), "count=2")
    tar = tmp_path / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"damaged in .*: 00000\.tar"):
        ldm_data("info", str(tmp_path), "--verify")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shpaes"], "unknown source 'shpaes'; did you mean 'shapes'. Sources: shapes, emoji, or a folder"),
        (["/no/such"], "unknown source '/no/such'; Sources: shapes, emoji, or a folder"),
        (["shapes", "cuont=3"], "'?cuont'?.*(?i:did you mean).*count"),
        (["shapes", "--image-format", "tiff"], "image_format='tiff'"),
        (["shapes", "--size", "0"], "size"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ldm_data("build", arguments[0], str(tmp_path / "out"), *arguments[1:])
    assert not (tmp_path / "out").exists()
