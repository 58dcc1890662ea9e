"""Prompts in the grammar people paste, and adapters that they ask for, in pictures."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch

from ldm.adapters.files import read, write
from ldm.adapters.library import Library, adapters_in
from ldm.adapters.lora import AdapterConfig, adapter_of, attach, attached, detach, eject, inject
from ldm.adapters.textual_inversion import teach
from ldm.models.text import TextEncoder
from ldm.pipeline import Given, Pipeline, Request, Steering
from ldm.prompts.encode import encode
from ldm.types import Conditioning
from tests.pipeline.small import PICTURE, request, small

AND = "a red cat AND a dog :0.5 AND fog :-0.3"


@pytest.fixture(scope="module")
def pipeline():
    return small()


def one(prompt, **changes):
    return Request((prompt,), (7,), **{"steps": 4, "guidance": 3.0, "width": 16, "height": 16} | changes)


class Spied:
    """The denoiser, and what it was told."""

    def __init__(self, pipeline):
        self.inner, self.calls = pipeline.denoiser, []
        self.config = self.inner.config

    def parameters(self):
        return self.inner.parameters()

    def __call__(self, x, t, cond):
        self.calls.append((t.clone(), cond))
        return self.inner(x, t, cond)


def spied(pipeline):
    spy = Pipeline(pipeline.autoencoder, pipeline.text, pipeline.denoiser, pipeline.diffusion, size=16)
    spy.denoiser = Spied(pipeline)
    return spy, spy.denoiser


def context(pipeline, text):
    return encode(pipeline.text, [text]).context[0]


def test_plain_words_are_what_they_were(pipeline):
    for changes in ({}, {"guidance": 1.0}, {"negative": "fog"}):
        drawn = pipeline(request(**changes))
        torch.testing.assert_close(drawn, pipeline(request(plain=True, **changes)), rtol=0, atol=1e-5)


def test_plain_prompts_take_brackets_as_they_are(pipeline):
    literal = pipeline(one("a (cat", plain=True))
    assert torch.equal(literal, pipeline(one(r"a \(cat")))
    with pytest.raises(ValueError, match=r"\(|bracket"):
        one("a (cat")
    with pytest.raises(ValueError, match="plain"):
        one("a cat", plain=True, clip_skip=1)


def test_edited_and_alternating_prompts_change_at_their_steps(pipeline):
    spy, denoiser = spied(pipeline)
    spy(one("a [cat:dog:0.5]", negative="[fog|rain]"))
    assert len(denoiser.calls) == 4
    for step, (_, cond) in enumerate(denoiser.calls):
        wanted = ("a cat", "a dog")[step >= 2]
        torch.testing.assert_close(cond.context[1], context(pipeline, wanted), rtol=0, atol=0)
        torch.testing.assert_close(cond.context[0], context(pipeline, ("fog", "rain")[step % 2]), rtol=0, atol=0)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_adaptive"])
def test_what_a_sampler_evaluates_between_levels_goes_with_the_upper_one(pipeline, sampler):
    spy, denoiser = spied(pipeline)
    drawn = one("[cat:dog:0.5]", sampler=sampler)
    levels = spy._passes(drawn)[0].levels
    spy(drawn)
    cat, dog = context(pipeline, "cat"), context(pipeline, "dog")
    for t, cond in denoiser.calls:
        early = float(t[1]) > float(levels.t[2]) + 1e-3
        assert torch.equal(cond.context[1], cat if early else dog)


def test_a_change_that_never_comes_changes_nothing(pipeline):
    assert torch.equal(pipeline(one("[cat:dog:1.0]")), pipeline(one("cat")))
    # alternation between one word and itself goes by the script, and draws the same
    same = pipeline(one("[cat|cat] AND cat :0"))
    torch.testing.assert_close(same, pipeline(one("cat")), rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_and_is_the_sum_of_its_branches(pipeline, guidance):
    """Against the formula of Liu et al. 2022, step by step: the ddim step of the mixed output."""
    drawn = one(AND, guidance=guidance)
    steps = list(pipeline.stream(drawn))
    texts, weights = ("a red cat", "a dog", "fog"), (1.0, 0.5, -0.3)
    levels = pipeline._passes(drawn)[0].levels

    def mixed(x, t, cond):
        def told(text):
            return pipeline.denoiser(x, t, Conditioning(context=context(pipeline, text)[None]))

        none = told("")
        return none + sum(guidance * w * (told(text) - none) for text, w in zip(texts, weights, strict=True))

    denoise = pipeline.diffusion.denoise(mixed, Conditioning())
    for before, after in itertools.pairwise(steps):
        estimate = denoise(before.x, levels[before.index + 1])
        torch.testing.assert_close(after.x0, estimate, rtol=1e-4, atol=1e-4)


def test_prompts_of_every_kind_are_the_same_alone_and_in_a_batch(pipeline):
    prompts = (AND, "a cat", "[cat|dog]", "(cat:1.4) BREAK in fog", "a very long prompt " * 9)
    seeds = tuple(range(5))
    for extra in ({}, {"steering": Steering(perturb="mid")}, {"given": Given(PICTURE[..., :16], 0.5)}):
        together = pipeline(Request(prompts, seeds, steps=3, width=16, height=16, **extra))
        for i in range(5):
            alone = pipeline(Request(prompts[i : i + 1], seeds[i : i + 1], steps=3, width=16, height=16, **extra))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-3)


def test_clip_skip(pipeline):
    torch.manual_seed(1)
    text = TextEncoder(replace(pipeline.text.config, layers=3)).eval()
    deep = Pipeline(pipeline.autoencoder, text, pipeline.denoiser, pipeline.diffusion, size=16)
    as_trained, skipping = (deep(one("a cat", clip_skip=skip)) for skip in (None, 1))
    assert torch.equal(as_trained, deep(one("a cat", clip_skip=0))) and not torch.equal(as_trained, skipping)
    assert deep.settings(one("a cat", clip_skip=1), 0)["Clip skip"] == 2
    with pytest.raises(ValueError, match=r"skip must be in 0..2"):
        deep.stream(one("a cat", clip_skip=3))


def test_a_long_prompt_says_all_it_says(pipeline):
    long = "a " + "very " * 30 + "red cat"
    cut = pipeline(one(long, plain=True))
    assert not torch.equal(pipeline(one(long)), cut)
    assert not torch.equal(pipeline(one(long)), pipeline(one(long.replace("red", "blue"))))
    assert torch.equal(cut, pipeline(one(long.replace("red", "blue"), plain=True)))


@pytest.fixture
def folder(tmp_path):
    """Two adapters of the small model, one for its text encoder too."""
    base = small()
    for number, (name, text) in enumerate((("glow", False), ("ink", True))):
        torch.manual_seed(number)
        components = {"denoiser": base.denoiser, "text": base.text}
        trained = inject(components, AdapterConfig(rank=2, alpha=2.0, text=text))
        for module in trained.values():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
        write(adapter_of(components), tmp_path / f"{name}.safetensors", "native")
        eject(components)
    return tmp_path


def test_adapters_that_prompts_ask_for(folder):
    pipeline, plain = small(), small()
    pipeline.adapters = {path.stem: path for path in folder.glob("*.safetensors")}
    weights = {k: v.clone() for k, v in pipeline.denoiser.state_dict().items()}
    without = pipeline(one("a cat"))
    drawn = pipeline(one("a cat <lora:glow:0.5><lora:ink>"))
    assert attached(pipeline.library.components) == {}
    stream = pipeline.stream(one("a cat <lora:glow:0.5><lora:ink>"))
    next(stream)
    assert attached(pipeline.library.components) == {"glow": 0.5, "ink": 1.0}
    stream.close()
    assert attached(pipeline.library.components) == {}
    assert not torch.equal(drawn, without)
    plain.attach(folder / "glow.safetensors", 0.5)
    plain.attach(folder / "ink.safetensors")
    assert torch.equal(plain(one("a cat")), drawn)
    assert torch.equal(pipeline(one("a cat")), without)  # what is not asked for comes off, to the bit
    assert all(torch.equal(v, weights[k]) for k, v in pipeline.denoiser.state_dict().items())
    settings = pipeline.settings(one("a cat <lora:glow:0.5>"), 0)["Lora hashes"]
    assert settings.startswith("glow: ") and len(settings) == 18


def test_streams_that_take_turns_have_each_its_own_adapters(folder):
    pipeline = small()
    pipeline.adapters = {path.stem: path for path in folder.glob("*.safetensors")}
    prompts = ("a cat <lora:glow>", "a cat <lora:ink>", "a cat")
    alone = [[step.x for step in pipeline.stream(one(prompt))] for prompt in prompts]
    turns = zip(*(pipeline.stream(one(prompt)) for prompt in prompts), strict=True)
    for i, steps in enumerate(turns):
        assert all(torch.equal(step.x, own[i]) for step, own in zip(steps, alone, strict=True))


def test_an_adapter_that_is_refused_changes_nothing(folder):
    pipeline = small()
    drawn = pipeline(one("a cat"))
    (folder / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        pipeline.attach(folder / "broken.safetensors")
    assert pipeline.adapters == {} and torch.equal(pipeline(one("a cat")), drawn)


def test_another_file_of_the_same_name_is_used(folder):
    pipeline, names = small(), ("glow", "ink")
    drawn = {}
    for name in names:
        pipeline.adapters = {"it": folder / f"{name}.safetensors"}
        drawn[name] = pipeline(one("a cat <lora:it>"))
        pipeline.adapters = {name: folder / f"{name}.safetensors"}
        assert torch.equal(drawn[name], pipeline(one(f"a cat <lora:{name}>")))
    assert not torch.equal(*drawn.values())
    always = small()
    always.attach(folder / "glow.safetensors")
    always.adapters = {"glow": folder / "ink.safetensors"}
    with pytest.raises(ValueError, match="two adapters of one name"):
        always.stream(one("a cat <lora:glow>"))


def test_what_others_attached_stays(folder):
    pipeline, files = small(), {name: folder / f"{name}.safetensors" for name in ("glow", "ink")}
    pipeline.adapters = files
    both = pipeline(one("a cat <lora:glow><lora:ink>"))
    attach(pipeline.library.components, read(files["glow"], pipeline.library.components), name="mine")
    assert torch.equal(pipeline(one("a cat <lora:ink>")), both)
    stream = pipeline.stream(one("a cat <lora:ink>"))
    next(stream)
    detach(pipeline.library.components, "mine")
    attach(pipeline.library.components, read(files["glow"], pipeline.library.components), name="mine")  # after ink
    next(stream)
    assert [*attached(pipeline.library.components)] == ["mine", "ink"]  # the order that it always has
    stream.close()
    assert attached(pipeline.library.components) == {"mine": 1.0}
    attach(pipeline.library.components, read(files["ink"], pipeline.library.components), name="ink")
    with pytest.raises(ValueError, match="'ink' is attached to the model already"):
        pipeline.stream(one("a cat <lora:ink>"))


def test_folders_of_peft_and_diffusers_are_one_adapter_each(folder):
    pipeline = small()
    adapter = read(folder / "ink.safetensors", pipeline.library.components)
    place = folder / "found"
    for path in ("deep/peft/unet", "deep/peft/text_encoder", "plain"):
        (place / path).mkdir(parents=True)
        (place / path / "adapter_config.json").write_text("{}")
        (place / path / "adapter_model.safetensors").write_bytes(path.encode())
    (place / "style").mkdir()
    write(adapter, place / "style" / "pytorch_lora_weights.safetensors", "native")
    write(adapter, place / "file.safetensors", "native")
    found = adapters_in(place)
    assert found == {
        "peft": place / "deep/peft", "plain": place / "plain", "style": place / "style",
        "file": place / "file.safetensors",
    }  # fmt: skip
    pipeline.adapters = found
    drawn = [pipeline(one(f"a cat <lora:{name}>")) for name in ("style", "file")]
    assert torch.equal(*drawn)
    hashes = pipeline.library.hashes((("peft", 1.0), ("file", 1.0)))
    text = place / "deep/peft/text_encoder/adapter_model.safetensors"
    text.write_bytes(b"other")
    again = Library(pipeline.library.components)
    again.paths = found
    assert again.hashes((("file", 1.0),)) == hashes.split(", ")[1]
    assert again.hashes((("peft", 1.0),)) != hashes.split(", ")[0]


def test_images_of_other_adapters_need_batches_of_their_own(folder):
    pipeline = small()
    pipeline.adapters = {path.stem: path for path in folder.glob("*.safetensors")}
    prompts = ("a cat <lora:glow>", "a cat", "a dog <lora:ink>")
    asked = Request(prompts, (1, 2, 3), steps=2, width=16, height=16, batch=1)
    drawn = pipeline(asked)
    for i in range(3):
        alone = pipeline(replace(asked, prompts=prompts[i : i + 1], seeds=asked.seeds[i : i + 1]))
        assert torch.equal(drawn[i : i + 1], alone)
    with pytest.raises(ValueError, match="one batch ask for different adapters"):
        pipeline.stream(replace(asked, batch=2))


def test_adapters_that_are_not_there_or_do_not_fit(folder):
    pipeline = small()
    with pytest.raises(ValueError, match="no folder of adapters was given"):
        pipeline.stream(one("a cat <lora:glow>"))
    pipeline.adapters = {"glow": folder / "glow.safetensors"}
    with pytest.raises(ValueError, match="did you mean 'glow'"):
        pipeline.stream(one("a cat <lora:glowing>"))
    wide = small("inpainting")  # another conv_in, but the same attention: it fits
    wide.attach(folder / "glow.safetensors")
    shutil.copy(folder / "glow.safetensors", folder / "other.safetensors")
    torch.manual_seed(0)
    other = small()
    other.denoiser = type(other.denoiser)(replace(other.denoiser.config, channels=32)).eval()
    other.library.components["denoiser"] = other.denoiser
    with pytest.raises(ValueError, match="made for another model"):
        other.attach(folder / "other.safetensors")


def test_learned_words(pipeline):
    pipeline = small()
    before = pipeline(one("a zorp"))
    teach(pipeline.text, "zorp", torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(pipeline(one("a zorp")), before)
    assert not torch.equal(pipeline(one("a zorp", plain=True)), before)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("first", ["a dog", "a [dog:cat:0.5]"])
def test_and_counts_where_every_branch_weighs_one(pipeline, guidance, first):
    """Against weights next to 1, which are known to be heard."""
    changes = {"guidance": guidance, "batch": 3}
    prompts = (f"{first} AND fog", f"{first} AND fog :1.000001", first)
    asked = Request(prompts, (7, 7, 7), steps=4, width=16, height=16, **changes)
    both, nearly, alone = pipeline(asked)
    torch.testing.assert_close(both, nearly, rtol=0, atol=1e-3)
    assert not torch.allclose(both, alone, atol=1e-2)
    torch.testing.assert_close(pipeline(one(prompts[0], guidance=guidance))[0], both, rtol=0, atol=1e-3)
