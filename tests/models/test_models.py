"""The networks against published sizes, formulas and independent implementations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from ldm.models.autoencoder import AutoencoderConfig, AutoencoderKL, Posterior
from ldm.models.clip import CLIP, ImageConfig, ImageEncoder
from ldm.models.text import VOCABULARY, TextConfig, TextEncoder, Tokenizer
from ldm.models.unet import UNet, UNetConfig
from ldm.nn.blocks import Attention, ResidualBlock
from ldm.nn.embeddings import position_embedding, timestep_embedding
from ldm.types import Conditioning

SMALL = dict(channels=16, multipliers=(1, 2), blocks=1, depths=(1, 0), context_dim=8, heads=2, norm_groups=4)


@pytest.mark.parametrize(
    ("model", "config", "parameters", "tensors"),
    [
        (AutoencoderKL, AutoencoderConfig(), 83_653_863, 248),
        (UNet, UNetConfig(), 859_520_964, 686),
        (UNet, UNetConfig(in_channels=9), 859_535_364, 686),
        (UNet, UNetConfig(context_dim=1024, head_dim=64, linear_projection=True), 865_910_724, 686),
        (TextEncoder, TextConfig(), 123_060_480 + 768 * 768, 149),
    ],
)
def test_default_sizes_are_stable_diffusions(model: type, config: object, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        module = model(config)
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert len(list(module.parameters())) == tensors


def test_posterior_against_torch_distributions() -> None:
    moments = torch.randn(3, 8, 2, 2, dtype=torch.float64)
    posterior = Posterior.from_moments(moments)
    normal = Normal(moments[:, :4], (0.5 * moments[:, 4:]).exp())
    expected = kl_divergence(normal, Normal(torch.zeros_like(normal.mean), torch.ones_like(normal.mean)))
    torch.testing.assert_close(posterior.kl(), expected.sum((1, 2, 3)))
    noise = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(posterior.sample(noise), normal.mean + normal.stddev * noise)
    clamped = Posterior.from_moments(torch.tensor([0.0, 99.0, 0.0, -99.0]).view(2, 2, 1, 1)).logvar.flatten()
    assert clamped.tolist() == [20.0, -30.0]


def tiny_autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    config = AutoencoderConfig(latent_channels=2, channels=8, multipliers=(1, 2), blocks=1, norm_groups=4)
    return AutoencoderKL(config).eval()


@torch.no_grad()
def test_autoencoder_owns_its_scale() -> None:
    model, image = tiny_autoencoder(), torch.rand(2, 3, 8, 8) * 2 - 1
    raw, decoded = model.encode(image), model.decode(model.encode(image))
    assert raw.shape == (2, 2, 4, 4) and decoded.shape == image.shape
    model.latent_mean.fill_(0.5)
    model.latent_std.fill_(4.0)
    torch.testing.assert_close(model.encode(image), (raw - 0.5) / 4)
    torch.testing.assert_close(model.decode(model.encode(image)), decoded)
    with pytest.raises(ValueError, match="multiple of 2"):
        model.encode(image[..., :7])


@torch.no_grad()
def test_encode_adds_the_posteriors_noise() -> None:
    model, image = tiny_autoencoder(), torch.rand(1, 3, 8, 8) * 2 - 1
    noise = torch.randn(1, 2, 4, 4)
    posterior = model.posterior(image)
    torch.testing.assert_close(model.encode(image, noise), posterior.mean + posterior.logvar.exp().sqrt() * noise)


def tiny_unet(**changes: object) -> UNet:
    torch.manual_seed(0)
    model = UNet(UNetConfig(**{**SMALL, **changes})).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():  # the zero-initialised layers would hide everything else
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def test_unet_hears_all_that_it_is_told() -> None:
    model = tiny_unet(pooled_dim=5, pooled_layers=2, size_dim=4, classes=3, in_channels=6)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    told = Conditioning(
        context=torch.randn(2, 5, 8),
        mask=torch.ones(2, 5, dtype=torch.bool),
        pooled=torch.randn(2, 5),
        sizes=torch.tensor([[64, 64, 0, 0, 64, 64], [80, 64, 3, 0, 64, 64]]),
        label=torch.tensor([0, 2]),
        concat=torch.randn(2, 2, 8, 8),
        control=tuple(torch.zeros(2, c, s, s) for c, s in ((16, 8), (16, 8), (16, 4), (32, 4), (32, 4))),
    )
    base = model(x, t, told)
    assert base.shape == (2, 4, 8, 8)
    torch.testing.assert_close(model(x, t, replace(told, mask=None, control=())), base)
    fewer = torch.ones(2, 5, dtype=torch.bool)
    fewer[:, 3:] = False
    others = {
        "time": (t + 50, told),
        "context": (t, replace(told, context=told.context + 1)),
        "mask": (t, replace(told, mask=fewer)),
        "pooled": (t, replace(told, pooled=told.pooled + 1)),
        "sizes": (t, replace(told, sizes=told.sizes.flip(0))),
        "label": (t, replace(told, label=told.label.flip(0))),
        "concat": (t, replace(told, concat=told.concat + 1)),
        "control": (t, replace(told, control=tuple(c + 1 for c in told.control))),
    }
    answers = {name: model(x, time, cond) for name, (time, cond) in others.items()}
    assert [name for name, out in answers.items() if torch.allclose(out, base, atol=1e-4)] == []
    cut = replace(told, context=told.context[:, :3], mask=None)  # a masked token is as good as absent
    torch.testing.assert_close(answers["mask"], model(x, t, cut), atol=1e-5, rtol=1e-5)
    for missing in ("pooled", "sizes", "label"):
        with pytest.raises(ValueError, match=missing):
            model(x, t, replace(told, **{missing: None}))


def test_unet_starts_at_zero_and_checks_its_levels() -> None:
    model = UNet(UNetConfig(**SMALL))  # type: ignore[arg-type]
    out = model(torch.randn(1, 4, 8, 8), torch.zeros(1), Conditioning(context=torch.randn(1, 3, 8)))
    assert out.abs().max() == 0 and model.factor == 2
    with pytest.raises(ValueError, match="depths"):
        UNetConfig(multipliers=(1, 2), depths=(1,))


@torch.no_grad()
def test_residual_block_against_its_formula() -> None:
    block = ResidualBlock(8, 16, 6, groups=4)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    h = F.conv2d(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias)), *block.conv1.parameters(), padding=1)
    h = h + F.linear(F.silu(emb), *block.emb.parameters())[..., None, None]
    h = F.conv2d(F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias)), *block.conv2.parameters(), padding=1)
    torch.testing.assert_close(block(x, emb), h + F.conv2d(x, *block.skip.parameters()))


@torch.no_grad()
def test_attention_layer_against_torchs() -> None:
    ours, theirs = Attention(8, 2, 6), torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    theirs.q_proj_weight.copy_(ours.to_q.weight)
    theirs.k_proj_weight.copy_(ours.to_k.weight)
    theirs.v_proj_weight.copy_(ours.to_v.weight)
    theirs.in_proj_bias.zero_()
    theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    x, context = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    keep = torch.tensor([[True, True, False], [True, True, True]])
    expected, _ = theirs(x, context, context, key_padding_mask=~keep)
    torch.testing.assert_close(ours(x, context, keep), expected, atol=1e-6, rtol=1e-5)


def test_timestep_embedding_has_cosines_first() -> None:
    t = torch.tensor([0.0, 1.0, 999.0])
    out = timestep_embedding(t, 8)
    for j in range(4):
        rate = 10_000 ** (-j / 4)
        torch.testing.assert_close(out[:, j], torch.cos(t * rate))
        torch.testing.assert_close(out[:, 4 + j], torch.sin(t * rate))
    with pytest.raises(ValueError, match="even"):
        timestep_embedding(t, 7)


def test_tokenizer_is_clips() -> None:
    tokenize = Tokenizer(77, pad_id=0)
    ids = tokenize(["a photo of a cat", "wow !", "x " * 200])
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]  # OpenAI's published encoding
    assert ids[0, 7:].eq(0).all()
    assert ids[1, :4].tolist() == [49406, 2781, 256, 49407]
    assert ids[2, -1] == 49407 and ids[2, 0] == 49406  # too long: the end token stays
    padded = Tokenizer(77, pad_id=49407)(["a photo of a cat"])
    assert padded[0, 6:].eq(49407).all()
    assert tokenize.bpe.vocab_size == VOCABULARY and tokenize.length("a photo of a cat") == 7


@torch.no_grad()
def test_text_layers_against_the_tower_run_by_hand() -> None:
    torch.manual_seed(0)
    config = TextConfig(width=16, layers=3, heads=2, embed_dim=8, context_length=12)
    last = TextEncoder(config).eval()
    before = TextEncoder(TextConfig(**{**config.__dict__, "skip": 1})).eval()
    before.load_state_dict(last.state_dict())
    prompts = ["a red circle", "two words or more"]
    ids, tower = last.tokenize(prompts), last.tower
    x = tower.token_embedding(ids) + tower.positional_embedding
    states = []
    for block in tower.transformer.resblocks:
        x = block(x, attn_mask=torch.full((12, 12), float("-inf")).triu(1))
        states.append(tower.ln_final(x))
    pooled = states[-1][torch.arange(2), ids.argmax(1)] @ tower.text_projection
    for encoder, expected in ((last, states[-1]), (before, states[-2])):
        told = encoder(prompts)
        torch.testing.assert_close(told.context, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(told.pooled, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.features(ids), F.normalize(pooled, dim=-1), atol=1e-5, rtol=1e-5)


def test_clip_features_are_unit_vectors_and_its_temperature_is_bounded() -> None:
    text = TextEncoder(TextConfig(width=16, layers=1, heads=2, embed_dim=8, context_length=12))
    clip = CLIP(text, ImageEncoder(ImageConfig(size=16, patch=8, width=16, layers=1, heads=2, embed_dim=8)))
    clip.logit_scale.data.fill_(99.0)
    image, words, scale = clip(torch.rand(2, 3, 16, 16), text.tokenize(["a", "b"]))
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(words.norm(dim=-1), torch.ones(2))
    assert scale.item() == pytest.approx(100, rel=1e-5)
    with pytest.raises(ValueError, match="embed_dim"):
        CLIP(text, ImageEncoder(ImageConfig(size=16, patch=8, width=16, layers=1, heads=2, embed_dim=4)))
    with pytest.raises(ValueError, match="skip"):
        TextConfig(skip=12)


@torch.no_grad()
def test_positions_tell_pixels_apart() -> None:
    """Over a constant picture with circular padding, only the position embedding can make pixels differ."""
    for positions in (False, True):
        model = tiny_unet(positions=positions, depths=(0, 0), middle_depth=0, multipliers=(1, 1))
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1):
                module.padding_mode = "circular"
                module._reversed_padding_repeated_twice = [1, 1, 1, 1]
        out = model(torch.ones(1, 4, 8, 8), torch.zeros(1), Conditioning(context=torch.zeros(1, 2, 8)))
        spread = out.std((2, 3)).max().item()
        assert (spread > 1e-3) == positions
    rows = position_embedding(3, 5, 8)
    assert rows.shape == (8, 3, 5)
    torch.testing.assert_close(rows[:4, :, 0].T, timestep_embedding(torch.arange(3), 4))
    torch.testing.assert_close(rows[4:, 0].T, timestep_embedding(torch.arange(5), 4))
    with pytest.raises(ValueError, match="multiple of 4"):
        position_embedding(2, 2, 6)


@torch.no_grad()
def test_scale_shift_against_its_equation() -> None:
    """Dhariwal and Nichol 2021, eq. 3, with the group norm written out."""
    torch.manual_seed(0)
    block = ResidualBlock(4, 6, 5, groups=2, scale_shift=True).double()
    for norm in (block.norm1, block.norm2):
        norm.weight.normal_(), norm.bias.normal_()
    x, emb = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def normed(h: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
        groups = h.view(3, 2, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return groups.view_as(h) * norm.weight[:, None, None] + norm.bias[:, None, None]

    h = block.conv1(F.silu(normed(x, block.norm1)))
    scale, shift = (emb * emb.sigmoid() @ block.emb.weight.T + block.emb.bias).view(3, 2, 6, 1, 1).unbind(1)
    h = block.conv2(F.silu(normed(h, block.norm2) * (scale + 1) + shift))
    torch.testing.assert_close(block(x, emb), block.skip(x) + h)
    unet = tiny_unet(scale_shift=True)
    assert unet.middle.residual.scale_shift and unet.up[0].layers[0].residual.emb.out_features == 2 * 32


def test_embedding_std_is_that_of_fresh_embeddings() -> None:
    for given, tokens, places in ((0.0, 0.02, 0.01), (1.0, 1.0, 1.0)):
        tower = TextEncoder(TextConfig(width=16, layers=1, heads=2, embed_dim=8, embedding_std=given)).tower
        assert tower.token_embedding.weight.std().item() == pytest.approx(tokens, rel=0.02)
        assert tower.positional_embedding.std().item() == pytest.approx(places, rel=0.1)
