"""The codebook chooses, passes gradients on and moves as van den Oord et al. write."""

from pathlib import Path

import pytest
import torch

from ldm.checkpoints.files import commit
from ldm.checkpoints.load import load_model, save_model
from ldm.models.vq import SMOOTHING, AutoencoderVQ, Codebook, CodebookConfig, Quantized, VQConfig, perplexity

SIZES = {"latent_channels": 2, "channels": 8, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4}


def tiny(**codebook: float) -> AutoencoderVQ:
    torch.manual_seed(0)
    return AutoencoderVQ(VQConfig(**SIZES, codebook=CodebookConfig(entries=16, **codebook)))  # type: ignore[arg-type]


def test_every_pixel_gets_its_nearest_code() -> None:
    torch.manual_seed(0)
    book = Codebook(CodebookConfig(entries=300), 3)
    torch.nn.init.normal_(book.codes)
    raw = torch.randn(2, 3, 50, 50)  # more than one chunk
    found = book(raw)
    for b, y, x in ((0, 0, 0), (1, 49, 49), (1, 7, 30), (0, 31, 2)):
        distances = [(raw[b, :, y, x] - code).square().sum().item() for code in book.codes]
        assert found.index[b, y, x] == min(range(300), key=distances.__getitem__)
        assert torch.equal(found.codes[b, :, y, x], book.codes[found.index[b, y, x]])
    every = torch.cdist(raw.permute(0, 2, 3, 1).flatten(0, 2).double(), book.codes.double())
    chosen = every.gather(1, found.index.flatten()[:, None])[:, 0]
    assert (chosen - every.min(1).values).max() < 1e-5


def test_gradients_go_straight_through_and_each_loss_term_trains_its_side() -> None:
    raw = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    codes = torch.tensor([[[[0.5, 5.0]]]], requires_grad=True)
    latent = Quantized(raw, codes, torch.zeros(1, 1, 2, dtype=torch.long))
    out = latent.straight_through()
    assert torch.equal(out, codes)
    (out * torch.tensor([3.0, -7.0])).sum().backward()
    assert raw.grad.flatten().tolist() == [3, -7] and codes.grad is None  # type: ignore[union-attr]
    raw.grad = None
    loss = latent.loss(CodebookConfig(entries=2, commitment=0.25))
    assert loss.item() == pytest.approx(1.25 * (0.25 + 9) / 2)
    loss.backward()
    assert codes.grad.flatten().tolist() == pytest.approx([-0.5, 3.0])  # type: ignore[union-attr]
    assert raw.grad.flatten().tolist() == pytest.approx([0.125, -0.75])  # type: ignore[union-attr]
    means = latent.loss(CodebookConfig(entries=2, commitment=0.25, decay=0.9))
    assert means.item() == pytest.approx(0.25 * (0.25 + 9) / 2)


def test_running_means_by_hand() -> None:
    book = Codebook(CodebookConfig(entries=2, decay=0.75), 1)
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0], [10.0]]))
    book.total.copy_(book.codes)
    raw = torch.tensor([1.0, 2.0, 9.0]).view(3, 1, 1, 1)
    tally = book.tally(book(raw))
    assert tally.tolist() == [[2, 3], [1, 9]]
    book.update(tally, torch.zeros(2, 1))
    count = [0.75 + 0.25 * 2, 0.75 + 0.25 * 1]
    total = [0.75 * 0 + 0.25 * 3, 0.75 * 10 + 0.25 * 9]
    assert book.count.tolist() == pytest.approx(count) and book.total.flatten().tolist() == pytest.approx(total)
    smooth = [(n + SMOOTHING) / (sum(count) + 2 * SMOOTHING) * sum(count) for n in count]
    assert book.codes.flatten().tolist() == pytest.approx([t / n for t, n in zip(total, smooth, strict=True)])
    assert not book.codes.requires_grad


def test_running_means_of_one_place_end_there() -> None:
    book = Codebook(CodebookConfig(entries=2, decay=0.5), 2)
    raw = torch.tensor([[3.0, -1.0]] * 4).view(4, 2, 1, 1)
    for _ in range(60):
        book.update(book.tally(book(raw)), torch.zeros(2, 2))
    chosen = book(raw).index[0, 0, 0]
    torch.testing.assert_close(book.codes[chosen], torch.tensor([3.0, -1.0]), atol=1e-3, rtol=0)


def test_a_code_that_nothing_chooses_goes_to_its_candidate() -> None:
    book = Codebook(CodebookConfig(entries=3, decay=0.5, restart=0.2), 1)
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0], [50.0], [-50.0]]))
    book.total.copy_(book.codes)
    raw = torch.tensor([0.1, 4.0, 4.2, -0.1]).view(4, 1, 1, 1)
    for _ in range(2):  # counts 0.5, 0.25: not yet
        book.update(book.tally(book(raw)), torch.tensor([[7.0], [4.1], [0.0]]))
    assert book.codes[1].item() == pytest.approx(50, rel=1e-3)
    book.update(book.tally(book(raw)), torch.tensor([[7.0], [4.1], [0.0]]))
    assert book.codes[1:].flatten().tolist() == pytest.approx([4.1, 0.0], abs=1e-3)
    assert book.codes[0].item() != pytest.approx(7.0, abs=1)  # was chosen
    assert (book(raw).index.flatten().tolist())[1:3] == [1, 1]


def test_perplexity_counts_the_codes_in_use() -> None:
    assert perplexity(torch.tensor([5.0, 0, 0])).item() == pytest.approx(1)
    assert perplexity(torch.tensor([2.0, 2, 2, 2])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([1.0, 3.0])).item() == pytest.approx(4 / 3**0.75)


def test_the_interface_is_that_of_the_gaussian_one() -> None:
    model = tiny()
    model.latent_mean.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1))
    model.latent_std.copy_(torch.tensor([0.5, 3.0]).view(2, 1, 1))
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    latent = model.encode(image, torch.randn(2, 2, 8, 8))
    assert latent.shape == (2, model.latent_channels, 16 // model.factor, 16 // model.factor)
    assert torch.equal(latent, model.encode(image))
    torch.testing.assert_close(latent * model.latent_std + model.latent_mean, model.encoded(image))
    rebuilt, found = model(image)
    torch.testing.assert_close(model.decode(latent), rebuilt)  # decoding quantises
    with torch.no_grad():
        off = (found.codes - model.latent_mean) / model.latent_std
        torch.testing.assert_close(model.decode(off), rebuilt)
    with pytest.raises(ValueError, match="must be a multiple of 2"):
        model.encode(torch.zeros(1, 3, 15, 16))


def test_every_parameter_gets_a_gradient() -> None:
    model = tiny()
    rebuilt, latent = model(torch.rand(2, 3, 16, 16))
    (rebuilt.square().mean() + latent.loss(model.config.codebook)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_checkpoint_keeps_it(decay: float, tmp_path: Path) -> None:
    model = tiny(decay=decay)
    with commit(tmp_path / "m") as stage:
        save_model(stage, {"autoencoder": model}, {"size": 16}, "vq")
    (loaded,) = load_model(tmp_path / "m").require("autoencoder")
    assert isinstance(loaded, AutoencoderVQ) and loaded.config == model.config
    image = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.decode(loaded.encode(image)), model.decode(model.encode(image)))
    (half,) = load_model(tmp_path / "m", dtype=torch.bfloat16).require("autoencoder")
    assert half.latent_std.dtype == torch.float32 and half.encode(image.bfloat16()).dtype == torch.bfloat16
    assert half.decode(half.encode(image.bfloat16())).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": 1}, "entries must be 0"),
        ({"entries": 4, "decay": 1.0}, "decay must be in"),
        ({"entries": 4, "restart": 0.1}, "needs codebook.decay"),
    ],
)
def test_codebooks_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodebookConfig(**changes)
