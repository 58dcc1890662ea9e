"""What building and loading shards costs beside the plain ways, on one core.

    python -m benchmarks.data --out data.json

Run it from the repository's root, on a machine that does nothing else. Build: captioned JPEG photographs of 640 x 480
to 256 x 256, decoded, resized (Lanczos), encoded and written; the plain way is Pillow and webdataset's TarWriter,
which checks, hashes and records nothing. Loading: an epoch of those shards as float batches in [-1, 1]; the plain
ways are webdataset's reader with a shuffle buffer, and torchvision's ImageFolder over the same encoded pictures.
Every subject must give the same pixels (their mean, over all pictures) before it is timed.
"""

import io
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import Comparison, Schedule, Subject, compare, table, write
from data_pipeline import shards
from data_pipeline.build import BuildConfig, build
from data_pipeline.loader import DataConfig, Loader, open_data
from data_pipeline.reader import ShardReader
from data_pipeline.sources.folder import FolderConfig, FolderSource

SIZE, QUALITY, BATCH = 256, 95, 16
TOLERANCE = 1e-4
"""Of the pixels' mean: the two resizes round at different places, by a level in a pixel now and then."""


def photographs(folder: Path, count: int) -> Path:
    """Smooth colours with grain, 640 x 480, each with a caption: about as hard on a codec as photographs are."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
        grain = rng.normal(0, 6, (480, 640, 1)).astype(np.int16)
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{i:05d}.jpg", quality=90)
        (folder / f"{i:05d}.txt").write_text(f"photograph number {i}")
    return folder


def mean_of(pictures: Iterator[bytes]) -> Tensor:
    """The mean of all pixels of encoded pictures."""
    return torch.tensor([np.mean([np.asarray(Image.open(io.BytesIO(p))).mean() for p in pictures])])


def build_subjects(source: Path, work: Path) -> dict[str, Subject]:
    """The same pictures and captions into shards, ours and the plain way; what is compared is read back from disk."""
    import webdataset

    def ours() -> Tensor:
        shutil.rmtree(work / "ours", ignore_errors=True)
        config = BuildConfig(size=SIZE, image_format="jpg", quality=QUALITY)
        report = build(FolderSource(FolderConfig(str(source))), config, work / "ours")
        assert report is not None
        return torch.tensor([report.delivered])

    def plain() -> Tensor:
        shutil.rmtree(work / "plain", ignore_errors=True)
        (work / "plain").mkdir()
        count = 0
        with webdataset.TarWriter(str(work / "plain" / "00000.tar")) as tar:
            for path in sorted(source.glob("*.jpg")):
                image = Image.open(path).convert("RGB")
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                box = (left, top, left + side, top + side)
                buffer = io.BytesIO()
                image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box).save(buffer, "JPEG", quality=QUALITY)
                caption = path.with_suffix(".txt").read_text(encoding="utf-8")
                tar.write(
                    {"__key__": path.stem, "jpg": buffer.getvalue(), "txt": caption, "json": {"captions": [caption]}}
                )
                count += 1
        return torch.tensor([count])

    def read_ours(_: Any) -> tuple[Tensor, ...]:
        made = ShardReader(work / "ours")
        return (mean_of(made[i].image_bytes for i in range(len(made))),)

    def read_plain(_: Any) -> tuple[Tensor, ...]:
        made = webdataset.WebDataset(str(work / "plain" / "00000.tar"), shardshuffle=False)
        return (mean_of(sample["jpg"] for sample in made),)

    return {"webdataset and Pillow": Subject(plain, read_plain), "ours": Subject(ours, read_ours)}


def load_subjects(folder: Path, work: Path) -> dict[str, Callable[[], Tensor]]:
    """An epoch of batches, shuffled; each returns the mean of all pixels."""
    from ldm.models.text import import_open_clip

    import_open_clip()  # makes torchvision importable beside a CPU build of torch
    import webdataset
    from torchvision import datasets, transforms

    config = DataConfig(str(folder))
    data = open_data(config)
    files = work / "files" / "all"
    files.mkdir(parents=True)
    for i in range(len(data[0])):
        (files / f"{data[0].key(i)}.jpg").write_bytes(data[0][i].image_bytes)
    stored = [str(folder / shard.file) for shard in data[0].info.shards]
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    def mean(batches: Iterator[Tensor]) -> Tensor:
        return torch.tensor([sum(float(batch.mean()) for batch in batches) / (len(data[0]) // BATCH)])

    def ours() -> Tensor:
        batches = iter(Loader(data, config, batch_size=BATCH, seed=0))
        return mean(next(batches).image for _ in range(len(data[0]) // BATCH))

    def reader() -> Tensor:
        found = webdataset.WebDataset(stored, shardshuffle=False).shuffle(200, initial=200).decode("pil")
        loader = DataLoader(found.to_tuple("jpg", "txt").map_tuple(usual, str).batched(BATCH), batch_size=None)
        return mean(image for image, _ in loader)

    def folders() -> Tensor:
        dataset = datasets.ImageFolder(str(work / "files"), usual)
        return mean(image for image, _ in DataLoader(dataset, batch_size=BATCH, shuffle=True))

    return {"webdataset": reader, "ImageFolder": folders, "ours": ours}


def memory_mb(folder: Path, epochs: int = 3) -> list[float]:
    """Resident memory after each epoch, one batch size of warm-up before."""
    config = DataConfig(str(folder))
    data = open_data(config)
    batches = iter(Loader(data, config, batch_size=BATCH, seed=0))
    found = []
    for _ in range(epochs):
        for _ in range(len(data[0]) // BATCH):
            next(batches)
        found.append(psutil.Process().memory_info().rss / 1e6)
    return found


def first_batch_s(folder: Path, work: Path, count: int = 10_000, repeats: int = 5) -> float:
    """Seconds from nothing to the first batch of `count` shards: hard links to one shard and its index."""
    info = shards.read_index(folder)
    shard, many = info.shards[0], work / "many"
    many.mkdir()
    listed = []
    for i in range(count):
        tar, index = f"{i:05d}.tar", f"{i:05d}.json"
        os.link(folder / shard.file, many / tar)
        os.link(folder / shard.index, many / index)
        listed.append(replace(shard, file=tar, index=index))
    shards.write_index(many, replace(info, samples=count * shard.samples, shards=tuple(listed)))
    times = []
    for seed in range(repeats):
        start = time.perf_counter()
        config = DataConfig(str(many))
        next(iter(Loader(open_data(config), config, batch_size=BATCH, seed=seed)))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(
    pictures: Annotated[int, typer.Option(help="photographs, a multiple of 16")] = 320,
    blocks: Annotated[int, typer.Option(help="timed blocks of each subject")] = 10,
    out: Annotated[Path | None, typer.Option(help="JSON with every raw block")] = None,
) -> None:
    """Measure, print the tables and two more figures, and write what is asked for."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    schedule = Schedule(blocks=blocks, min_block_s=0.1, warm_up=1)
    results: list[Comparison] = []
    with tempfile.TemporaryDirectory(prefix="ldm-bench-") as folder:
        work = Path(folder)
        subjects = build_subjects(photographs(work / "photographs", pictures), work)
        kinds: tuple[tuple[str, str, Any], ...] = (
            (f"build of {pictures} pictures", "webdataset and Pillow", subjects),
            (f"loading of {pictures} pictures", "webdataset", None),
        )
        for title, baseline, given in kinds:
            made = given or load_subjects(work / "ours", work)
            results.append(compare(made, baseline=baseline, tolerance=TOLERANCE, title=title, schedule=schedule))
            typer.echo(table(results[-1]))
            for row in results[-1].rows:
                if row.median_s:
                    typer.echo(f"{row.subject.name}: {pictures / row.median_s:.0f} pictures/s on one core")
            typer.echo("")
        typer.echo(f"memory after each of 3 epochs: {', '.join(f'{mb:.1f}' for mb in memory_mb(work / 'ours'))} MB")
        typer.echo(f"first batch of 10,000 shards: {first_batch_s(work / 'ours', work):.2f} s")
    if out is not None:
        write(results, out)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
