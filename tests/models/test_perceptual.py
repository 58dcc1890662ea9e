"""LPIPS is what its definition says; weights are read in the published layouts, or refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checkpoints import perceptual as files
from ldm.checkpoints.files import commit, sha256
from ldm.checkpoints.load import save_model
from ldm.checkpoints.perceptual import HEADS, PUBLISHED, VGG, load_perceptual
from ldm.models.perceptual import Perceptual, PerceptualConfig, random_perceptual

# torchvision's VGG16, "configuration D" of Simonyan & Zisserman 2015: widths, M for a pool
LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in its list of layers


def published(width: int = 64) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random tensors under the names and shapes of both files."""
    random = torch.Generator().manual_seed(4)
    vgg, heads, place, channels = {}, {}, 0, 3
    for layer in LAYERS:
        if layer == "M":
            place += 1
            continue
        out = int(layer) * width // 64
        vgg[f"features.{place}.weight"] = torch.randn(out, channels, 3, 3, generator=random) * (2 / channels / 9) ** 0.5
        vgg[f"features.{place}.bias"] = torch.randn(out, generator=random) * 0.1
        place, channels = place + 2, out
    for i, c in enumerate((64, 128, 256, 512, 512)):
        heads[f"lin{i}.model.1.weight"] = torch.rand(1, c * width // 64, 1, 1, generator=random)
    return vgg, heads


def reference(vgg: dict[str, Tensor], heads: dict[str, Tensor], a: Tensor, b: Tensor) -> list[float]:
    """LPIPS by its text, a picture and a pixel's vector at a time, layer by layer as torchvision lists them."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    distances = []
    for one, other in zip(a, b, strict=True):
        found = []
        for image in (one, other):
            x = ((image.permute(1, 2, 0) - shift) / scale).permute(2, 0, 1)[None]
            taps = []
            for place in range(30):
                if f"features.{place}.weight" in vgg:
                    x = F.conv2d(x, vgg[f"features.{place}.weight"], vgg[f"features.{place}.bias"], padding=1)
                elif f"features.{place - 1}.weight" in vgg:
                    x = x.clamp(min=0)
                else:
                    x = F.max_pool2d(x, 2, 2)
                if place in TAPS:
                    taps.append(x[0].flatten(1).T)  # [H W, C]
            found.append(taps)
        total = 0.0
        for i, (x, y) in enumerate(zip(*found, strict=True)):
            x = x / (x.norm(dim=1, keepdim=True) + 1e-10)
            y = y / (y.norm(dim=1, keepdim=True) + 1e-10)
            total += ((x - y) ** 2 @ heads[f"lin{i}.model.1.weight"].flatten()).mean().item()
        distances.append(total)
    return distances


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    return torch.rand(2, 3, 32, 48, generator=random) * 2 - 1, torch.rand(2, 3, 32, 48, generator=random) * 2 - 1


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts both files, of random weights, in a folder, and their hashes where the published ones stand."""

    def written(**changes: dict[str, Tensor]) -> Path:
        vgg, heads = published()
        torch.save(changes.get("vgg", vgg | {"classifier.0.weight": torch.zeros(2)}), tmp_path / VGG)
        torch.save(changes.get("heads", heads), tmp_path / HEADS)
        known = {name: (url, sha256(tmp_path / name)) for name, (url, _) in PUBLISHED.items()}
        monkeypatch.setattr(files, "PUBLISHED", known)
        return tmp_path

    return written


def test_the_published_layouts_give_the_distance_of_the_definition(
    write: Callable[..., Path], pictures: tuple[Tensor, Tensor]
) -> None:
    folder = write()
    model = load_perceptual(str(folder))
    assert sum(p.numel() for p in model.stages.parameters()) == 14_714_688
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    found = model(*pictures)
    assert found.tolist() == pytest.approx(reference(*published(), *pictures), rel=1e-4)
    with commit(folder / "ours") as stage:
        save_model(stage, {"perceptual": model}, {}, "perceptual")
    assert torch.equal(load_perceptual(str(folder / "ours"))(*pictures), found)


def test_missing_files_are_named_with_their_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_perceptual(str(tmp_path))
    text = str(error.value)
    assert "vgg16-397923af.pth from https://download.pytorch.org/models/vgg16-397923af.pth" in text
    assert "vgg.pth from https://" in text and str(tmp_path) in text and "\n" not in text
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"x")
    with pytest.raises(ValueError) as error:
        load_perceptual(str(tmp_path))
    assert "vgg16" not in str(error.value)


def test_a_file_that_is_not_the_published_one_is_refused(write: Callable[..., Path]) -> None:
    folder = write()
    path = folder / HEADS
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"vgg\.pth is not the published file: its sha256 is"):
        load_perceptual(str(folder))


def test_a_file_without_a_layer_is_refused(write: Callable[..., Path]) -> None:
    vgg, _ = published()
    del vgg["features.17.bias"]
    folder = write(vgg=vgg)
    with pytest.raises(ValueError, match=r"does not hold features\.17\.bias"):
        load_perceptual(str(folder))


def test_random_features_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two = random_perceptual(), random_perceptual()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_distance_is_zero_for_equal_pictures_symmetric_and_grows_with_blur() -> None:
    model = random_perceptual()
    random = torch.Generator().manual_seed(0)
    a = F.interpolate(torch.rand(3, 3, 16, 16, generator=random) * 2 - 1, 32)
    soft = [F.avg_pool2d(F.pad(a, [k // 2] * 4, mode="reflect"), k, 1) for k in (3, 5, 9)]
    assert model(a, a).tolist() == [0, 0, 0]
    torch.testing.assert_close(model(a, soft[0]), model(soft[0], a))
    distances = torch.stack([model(a, b) for b in soft])
    assert (distances.diff(dim=0) > 0).all() and (distances > 0).all()
    assert model.pooled(a).shape == (3, 23 * 16)


def test_its_gradient_is_right_and_finite_where_features_are_zero() -> None:
    torch.manual_seed(0)
    model = Perceptual(PerceptualConfig(width=2)).double()
    b = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    a = torch.rand(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(a, b).sum(), a)
    direction = torch.randn_like(a)
    with torch.no_grad():
        slope = (model(a + 1e-6 * direction, b) - model(a - 1e-6 * direction, b)).sum() / 2e-6
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)
    for p in model.stages.parameters():
        torch.nn.init.zeros_(p)
    (gradient,) = torch.autograd.grad(model(a, b).sum(), a)
    assert torch.isfinite(gradient).all()


def test_pictures_too_small_for_five_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 px"):
        random_perceptual()(torch.zeros(1, 3, 15, 16), torch.zeros(1, 3, 15, 16))
