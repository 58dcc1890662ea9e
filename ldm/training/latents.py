"""Latents and text embeddings computed before training: their making, and what a run asks of them."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline import shards, storage
from data_pipeline.assembly import PLAN, assemble
from data_pipeline.buckets import Shape, assign
from data_pipeline.config import DataConfig
from data_pipeline.ledger import Ledger, shard_name, write_ledger
from data_pipeline.precompute import MOMENTS, TEXT, Cache, CacheKey, cache_source, dump_array
from data_pipeline.reader import ShardReader
from data_pipeline.report import Report
from data_pipeline.samples import framing_of, open_folder, shapes_of, size_of
from data_pipeline.storage import join
from data_pipeline.transforms import cut, decode, to_tensor
from ldm.checkpoints.model import weights_sha256
from ldm.models.autoencoder import AutoencoderKL, Posterior

CHUNK = 16
"""Samples that are encoded together."""


def latents_of(autoencoder: AutoencoderKL, moments: Tensor, noise: Tensor) -> Tensor:
    """moments [B, 2 C, h, w], noise [B, C, h, w] -> normalised latents, as `autoencoder.encode` gives them."""
    raw = Posterior.from_moments(moments).sample(noise)
    return (raw - autoencoder.latent_mean) / autoencoder.latent_std


def check_cache(cache: Cache, autoencoder: nn.Module, text: nn.Module) -> None:
    """Raises ValueError, naming which, when other models made it than a run has."""
    wanted = {"autoencoder": weights_sha256(autoencoder)}
    cache.key.check(cache.path, wanted | ({"text": weights_sha256(text)} if cache.key.text else {}))


def key_of(reader: ShardReader, config: DataConfig, autoencoder: AutoencoderKL, text: nn.Module | None) -> CacheKey:
    """What decides the cache of a shard folder."""
    return CacheKey(
        data=reader.fingerprint,
        autoencoder=weights_sha256(autoencoder),
        text=weights_sha256(text) if text else "",
        **framing_of(size_of([reader], config), config),
    )


def encode(
    config: DataConfig,
    autoencoder: AutoencoderKL,
    text: nn.Module | None,
    out: str,
    part: tuple[int, int] = (1, 1),
    progress: Callable[[int, int], None] | None = None,
) -> Report | None:
    """Make the cache `out` of one shard folder, for runs with this `config`; started again it makes what is missing.

    The models are where they shall work, in float32. part (i, n): only every n-th shard, from the i-th on; None until
    all are there. `progress(done, total)` counts shards. Raises ValueError when `out` is another cache or anything
    else, when `config` has several folders or crops that no cache can hold.
    """
    if len(config.paths) != 1 or config.crops < 1:
        raise ValueError("a cache is made of one shard folder, with data.crops of 1 or more")
    reader = open_folder(config.paths[0], config)
    size = size_of([reader], config)
    key = key_of(reader, config, autoencoder, text)
    plan: dict[str, Any] = {
        "shards": len(reader.info.shards),
        "samples": len(reader),
        "size": None if config.buckets else size,
        "image_format": MOMENTS,
        "source": cache_source(key),
        "version": 1,
    }
    _check_plan(out, plan["source"]["kind"], key)
    job = _ShardJob(reader, config, shapes_of(size, config), autoencoder, text, out)

    def run(numbers: list[int]) -> Iterator[int]:
        for number in numbers:
            job(number)
            yield number

    return assemble(out, plan, run, part, progress)


def _check_plan(out: str, kind: str, key: CacheKey) -> None:
    path = join(out, PLAN)
    if storage.is_folder(out) and storage.exists(path):
        source = shards.unseal(path)["source"]
        if source["kind"] == kind:
            CacheKey(**source["settings"]).check(out, asdict(key))


@dataclass(frozen=True)
class _ShardJob:
    """One shard of the data -> the shard of the cache with the same number."""

    reader: ShardReader
    config: DataConfig
    shapes: list[Shape]
    autoencoder: AutoencoderKL
    text: nn.Module | None
    out: str

    def __call__(self, number: int) -> None:
        stop = self.reader.ends[number]
        first = stop - self.reader.info.shards[number].samples
        name = shard_name(number)
        tar = shards.write_tar(join(self.out, f"{name}.tar"), self._entries(range(first, stop)))
        write_ledger(self.out, name, Ledger(first, stop, tar.bytes, tar.sha256, tar.samples, []))

    def _entries(self, rows: range) -> Iterator[shards.Entry]:
        for start in range(rows.start, rows.stop, CHUNK):
            chunk = range(start, min(start + CHUNK, rows.stop))
            samples = [self.reader[row] for row in chunk]
            targets = [self._target(row) for row in chunk]
            moments = self._moments(chunk, [sample.image_bytes for sample in samples], targets)
            texts = self._texts([sample.captions for sample in samples])
            for row, sample, target, found, words in zip(chunk, samples, targets, moments, texts, strict=True):
                about = {
                    "row": row,
                    "size": list(target),
                    "captions": len(sample.captions),
                    "words": len(sample.captions[0].split()),
                    "content": shards.sha256(sample.image_bytes),
                }
                yield shards.Entry(sample.key, {MOMENTS: dump_array(found), **words}, about)

    def _target(self, row: int) -> Shape:
        return self.shapes[int(assign(self.reader.sizes_of([row]), self.shapes)[0])]

    @torch.no_grad()
    def _moments(self, rows: range, pictures: list[bytes], targets: list[Shape]) -> list[Tensor]:
        """[V, 2 C, h, w] of each picture: of every frame that a run may ask for. One pass for each shape."""
        framing, device = self.config.framing, self.autoencoder.latent_std.device
        found: dict[int, Tensor] = {}
        for target in sorted(set(targets)):
            chosen = [i for i, shape in enumerate(targets) if shape == target]
            cuts = []
            for i in chosen:
                image = decode(pictures[i])
                cuts += [to_tensor(cut(image, frame, target)) for frame in framing.variants(image.size, target)]
            posteriors = [self.autoencoder.posterior(part.to(device)) for part in torch.stack(cuts).split(CHUNK)]
            moments = torch.cat([torch.cat([p.mean, p.logvar], dim=1).cpu() for p in posteriors])
            found |= dict(zip(chosen, moments.chunk(len(chosen)), strict=True))
        return [found[i] for i in range(len(rows))]

    @torch.no_grad()
    def _texts(self, captions: list[tuple[str, ...]]) -> list[dict[str, bytes]]:
        """The members with what the text encoder makes of each sample's captions; none without an encoder."""
        if self.text is None:
            return [{} for _ in captions]
        counts = [len(c) for c in captions]
        every = [caption for several in captions for caption in several]
        parts = [self.text(every[i : i + CHUNK]) for i in range(0, len(every), CHUNK)]
        members: list[dict[str, bytes]] = [{} for _ in captions]
        for name in TEXT:
            if getattr(parts[0], name) is not None:
                rows = torch.cat([getattr(part, name).cpu() for part in parts]).split(counts)
                for member, values in zip(members, rows, strict=True):
                    member[f"{name}.npy"] = dump_array(values)
        return members
