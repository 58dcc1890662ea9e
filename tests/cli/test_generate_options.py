"""`ldm generate`: adapters, learned words, prompt files, wildcards, styles, types and memory."""

import pytest
import torch

import ldm.cli.memory
from ldm.adapters.adapter import Adapter
from ldm.adapters.files import write
from ldm.adapters.fused import sites
from ldm.checkpoints.files import save_tensors
from ldm.checkpoints.textual_inversion import SINGLE
from ldm.cli.memory import activation_bytes, weight_bytes
from ldm.cli.options import Asked, Drawing
from ldm.cli.pictures import Pictures
from ldm.cli.wishes import batches, named, tagged, wishes
from ldm.images import read_record, read_settings
from ldm.pipeline import Upscale
from tests.cli.generating import generate, save, save_pictures
from tests.pipeline.small import request, small


def save_adapter(path, seed):
    """A LoRA of rank 2 on every attention of the small U-Net."""
    denoiser = small().denoiser
    generator = torch.Generator().manual_seed(seed)
    part = {
        name: {
            "down": torch.randn(2, weight.shape[1], generator=generator),
            "up": torch.randn(weight.shape[0], 2, generator=generator),
            "alpha": torch.tensor(2.0),
        }
        for name, weight in sites(denoiser).items()
        if name.endswith("attn2.to_q")
    }
    assert part
    write(Adapter({"denoiser": part}, {"denoiser": ("unet", denoiser.config)}), path, "native")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    save(folder / "plain"), save_pictures(folder)
    (folder / "loras").mkdir(), (folder / "words").mkdir()
    save_adapter(folder / "loras" / "zorp.safetensors", 1), save_adapter(folder / "extra.safetensors", 2)
    generator = torch.Generator().manual_seed(3)
    save_tensors(folder / "words" / "sks.safetensors", {SINGLE: torch.randn(2, 16, generator=generator)})
    (folder / "prompts.txt").write_text('# of two kinds\na dog\na bird --seed 7 --steps 1 --negative_prompt "fog"\n')
    (folder / "styles.csv").write_text("name,prompt,negative_prompt\nsketch,a sketch of {prompt},colour\nold,old,new\n")
    (folder / "wild" / "deep").mkdir(parents=True)
    (folder / "wild" / "colour.txt").write_text("red\ngreen\nblue\nwhite\n")
    return folder


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def one(out, *words):
    drawn, _ = generate("plain", *words, "--steps", 2, "--out", out)
    return drawn[0]


def test_an_adapter_for_all_prompts_and_one_that_a_prompt_asks_for(tmp_path):
    bare = one(tmp_path / "a", "a cat").read_bytes()
    by_file = one(tmp_path / "b", "a cat", "--lora", "loras/zorp.safetensors:0.5")
    by_name = one(tmp_path / "c", "a cat <lora:zorp:0.5>", "--loras", "loras")
    settings = read_settings(by_file)
    assert settings["Prompt"] == "a cat <lora:zorp:0.5>" and settings["Lora hashes"].startswith("zorp: ")
    assert read_settings(by_name) == settings != read_settings(one(tmp_path / "d", "a cat"))
    pixels = [path.read_bytes().partition(b"IDAT")[2] for path in (by_file, by_name)]
    assert pixels[0] == pixels[1] != bare.partition(b"IDAT")[2]
    assert set(read_record(by_name)["files"]) == {"plain", "loras/zorp.safetensors"}
    plain = one(tmp_path / "e", "a cat", "--plain", "--lora", "loras/zorp.safetensors:0.5")
    assert read_settings(plain)["Prompt"] == "a cat"
    assert plain.read_bytes().partition(b"IDAT")[2] == pixels[0]
    for path in (by_file, by_name, plain):
        (again,), _ = generate("--from", path, "--out", tmp_path / "again")
        assert again.read_bytes() == path.read_bytes()
    weaker = one(tmp_path / "f", "--from", by_file, "--lora", "loras/zorp.safetensors:0.1")
    assert read_settings(weaker)["Prompt"] == "a cat <lora:zorp:0.1>"


def test_a_grid_of_an_adapters_weight(tmp_path):
    words = [
        "--lora",
        "extra.safetensors",
        "--loras",
        "loras",
        "--grid",
        "lora.zorp=0,1,0.5",
        "--grid",
        "lora.extra=1,0",
    ]
    drawn, _ = generate("plain", "a cat", *words, "--steps", 2, "--out", tmp_path)
    assert len({path.read_bytes().partition(b"IDAT")[2] for path in drawn[:6]}) == 6
    assert read_settings(drawn[4])["Prompt"] == "a cat <lora:extra:0> <lora:zorp:1>"
    for path in (drawn[1], drawn[5]):
        (again,), _ = generate("--from", path, "--out", tmp_path / "again")
        assert again.read_bytes() == path.read_bytes()


def test_the_word_of_an_adapter_counts_as_its_vectors(tmp_path):
    """Of nine characters that are five tokens by themselves, it is two vectors: where its adapter is on."""
    denoiser = small().denoiser
    name, weight = next((n, w) for n, w in sites(denoiser).items() if n.endswith("attn2.to_q"))
    factors = {"down": torch.ones(1, weight.shape[1]), "up": torch.ones(len(weight), 1), "alpha": torch.tensor(1.0)}
    words = {"xqzorpvwk": (torch.ones(2, 16),)}
    adapter = Adapter({"denoiser": {name: factors}}, {"denoiser": ("unet", denoiser.config)}, words=words)
    write(adapter, tmp_path / "glow.safetensors", "native")
    prompts = ("a xqzorpvwk", "a xqzorpvwk <lora:glow>")
    options = ("--loras", tmp_path, "--negative", "xqzorpvwk", "--steps", 1, "--out", tmp_path / "out")
    _, said = generate("plain", *prompts, *options)
    counts = [line.split("/")[0] for line in said.splitlines() if " tokens" in line]
    assert counts == ["6", "5", "3"]


def test_a_learned_word(tmp_path):
    by_file = one(tmp_path / "a", "a sks cat", "--embeddings", "words/sks.safetensors")
    by_folder = one(tmp_path / "b", "a sks cat", "--embeddings", "words")
    pixels = [
        path.read_bytes().partition(b"IDAT")[2] for path in (by_file, by_folder, one(tmp_path / "c", "a sks cat"))
    ]
    assert pixels[0] == pixels[1] != pixels[2]
    (again,), _ = generate("--from", by_file, "--out", tmp_path / "again")
    assert again.read_bytes() == by_file.read_bytes()


def test_a_file_of_prompts(tmp_path):
    drawn, _ = generate("plain", "a cat", "--prompts", "prompts.txt", "--count", 2, "--steps", 2, "--out", tmp_path)
    found = [read_settings(path) for path in drawn[:-1]]
    assert [(s["Prompt"], s["Seed"], s["Steps"], s.get("Negative prompt")) for s in found] == [
        ("a cat", 0, 2, ""), ("a cat", 1, 2, ""), ("a dog", 0, 2, ""), ("a dog", 1, 2, ""),
        ("a bird", 7, 1, "fog"), ("a bird", 8, 1, "fog"),
    ]  # fmt: skip
    (again,), _ = generate("--from", drawn[5], "--out", tmp_path / "again")
    assert again.read_bytes() == drawn[5].read_bytes()
    others, _ = generate("--from", drawn[5], "--prompts", "prompts.txt", "--out", tmp_path / "others")
    assert [read_settings(path)["Prompt"] for path in others] == ["a dog", "a bird", "a dog"]  # the last is the sheet


def test_styles_and_wildcards():
    asked = Asked(("a cat",), styles="styles.csv", style=("sketch", "old"), count=40, wildcards="wild", seed=3)
    found = wishes(asked, Drawing(negative="a __colour__ sky"), Pictures())
    assert {wish.prompt for wish in found} == {"a sketch of a cat, old"}
    skies = [f"a {colour} sky, colour, new" for colour in ("red", "green", "blue", "white")]
    assert {wish.drawing.negative for wish in found} == set(skies)
    assert found == wishes(asked, Drawing(negative="a __colour__ sky"), Pictures())
    later = wishes(Asked(**{**vars(asked), "seed": 5}), Drawing(negative="a __colour__ sky"), Pictures())
    assert [w.drawing for w in later[:38]] == [w.drawing for w in found[2:]]  # each image's own seed decides
    assert len(batches(found)) > 4 and [w.seed for w in found] == [s for b in batches(found) for s in b.seeds]


def test_without_wildcards_braces_are_text():
    (found,) = wishes(Asked(("a {b|c} __d__",)), Drawing(), Pictures())
    assert found.prompt == "a {b|c} __d__"


def test_batches_are_of_images_that_can_be_drawn_together():
    prompts = ("a <lora:x:1>", "b <lora:x:1>", "c", "d")
    found = batches(wishes(Asked(prompts, count=3), Drawing(batch=4), Pictures()))
    assert [len(batch.prompts) for batch in found] == [4, 2, 4, 2]
    assert [p for batch in found for p in batch.prompts] == [p for p in prompts for _ in range(3)]
    varied = batches(wishes(Asked(("a",), count=3, seed=5, variation="7:0.25"), Drawing(batch=2), Pictures()))
    assert [(b.seeds, b.variation) for b in varied] == [((5, 5), ((7, 8), 0.25)), ((5,), ((9,), 0.25))]


def test_tags(tmp_path):
    (tmp_path / "a:1.safetensors").touch(), (tmp_path / "b.pt").touch()
    assert named([f"{tmp_path}/b.pt:-0.5"]) == {"b": (tmp_path / "b.pt", -0.5)}
    assert named([f"{tmp_path}/b.pt"]) == {"b": (tmp_path / "b.pt", 1.0)}
    with pytest.raises(ValueError, match="'a:1' is the name of another, or cannot be one"):
        named([f"{tmp_path}/a:1.safetensors"])
    assert tagged("a <lora:x.y:1> <lora:xzy:1>", "x.y", 0.25) == "a <lora:x.y:0.25> <lora:xzy:1>"
    assert tagged("a", r"\1", 2) == r"a <lora:\1:2>"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a <lora:zrop>", "--loras", "loras"], "unknown adapter 'zrop', did you mean 'zorp'"),
        (["a <lora:zorp>"], "asks for the adapter 'zorp', and none was given: --loras FOLDER or --lora FILE"),
        (["a", "--lora", "extr.safetensors"], "no adapter at 'extr.safetensors', did you mean 'extra.safetensors'"),
        (["a", "--loras", "nowhere"], "nowhere is no folder of adapters"),
        (["a", "--embeddings", "words/skz.safetensors"], "no textual inversion at .* did you mean 'words/sks.safe"),
        (["a ((cat)"], "never closed|bracket"),
        (["a cat", "--negative", "fog]"], "closes nothing|bracket"),
        (["a", "--clip-skip", "-1"], "--clip-skip counts from 1"),
        (["a", "--dtype", "fp17"], "unknown dtype 'fp17', did you mean 'fp16'"),
        (["a", "--style", "sketch"], "--style names one of the --styles"),
        (["a", "--style", "sketsh", "--styles", "styles.csv"], "unknown style 'sketsh', did you mean 'sketch'"),
        (["a __colours__", "--wildcards", "wild"], "unknown wildcard 'colours', did you mean 'colour'"),
        (["--prompts", "nothing.txt"], "nothing.txt cannot be read"),
        ([], "say what to draw: PROMPT"),
        (["a", "--variation", "7"], "--variation must be SEED:STRENGTH"),
        (["a", "--image", "picture.png", "--mask", "little.png"], "the mask is 12x8 px and the picture 24x16"),
        (["a", "--image", "picture.png", "--mask", "little.png", "--size", "8"], "the mask is 12x8 px and the pict"),
        (["a", "--image", "picture.png", "--strength", "1.5"], "strength must be above 0 and at most 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_weights_are_read(words, message, place, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("ldm.checkpoints.load.load_component", lambda *_: pytest.fail("weights were read"))
    Image.new("L", (12, 8), 255).save(place / "little.png")
    with pytest.raises(ValueError, match=message) as caught:
        generate("plain", *words, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_has_to_be_named():
    with pytest.raises(ValueError, match="say what to draw with: MODEL"):
        generate("--prompts", "prompts.txt")


def test_an_unknown_clip_skip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="skip"):
        one(tmp_path / "out", "a", "--clip-skip", 2)  # the small text encoder has one layer
    assert not (tmp_path / "out").exists()


def test_types(tmp_path):
    pictures = [one(tmp_path / dtype, "a cat", "--dtype", dtype).read_bytes() for dtype in ("fp32", "bf16")]
    assert pictures[0].partition(b"IDAT")[2] != pictures[1].partition(b"IDAT")[2]
    assert read_record(one(tmp_path / "x", "a cat", "--dtype", "bf16"))["options"]["dtype"] == "bf16"


def test_too_little_memory_is_said_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ldm.cli.memory, "free_bytes", lambda _: 1_000)
    with pytest.raises(ValueError, match=r"the weights of plain take about .* free on cpu: try --dtype bf16"):
        one(tmp_path / "out", "a cat")
    free = weight_bytes(small_file := tmp_path.__class__("plain"), 4)
    monkeypatch.setattr(ldm.cli.memory, "free_bytes", lambda _: free + 1)
    words = ["a cat", "--size", 512, "--count", 4]
    with pytest.raises(
        ValueError, match=r"4 pictures of 512x512 px at a time take about .*try --low-memory, a smaller -"
    ):
        one(tmp_path / "out", *words)
    assert small_file.is_dir() and not (tmp_path / "out").exists()
    one(tmp_path / "out", "a cat")


def test_the_bytes_of_weights():
    """Of the model's folder those of its parameters, also in another type."""
    pipeline = small()
    parts = (pipeline.autoencoder, pipeline.text, pipeline.denoiser)
    numbers = sum(t.numel() for part in parts for t in part.state_dict().values())
    place = ldm.cli.memory.Path("plain")
    assert weight_bytes(place) == weight_bytes(place, 4) == 4 * numbers and weight_bytes(place, 2) == 2 * numbers


def test_the_estimate_of_activations_grows_as_they_do():
    pipeline, asked = small(), request(width=64, height=64)

    def estimate(low_memory=False, **changes):
        return activation_bytes(pipeline, request(**{"width": 64, "height": 64} | changes), low_memory=low_memory)

    base = estimate()
    assert estimate(width=128, height=128) == 4 * base == estimate(upscale=Upscale(2.0))
    assert estimate(prompts=("a",) * 6, seeds=(0,) * 6) == 2 * base
    assert asked.guidance != 1 and estimate(guidance=1.0) < base
    pipeline.denoiser = torch.nn.Linear(1, 1)  # of which nothing is counted: what is left is the decoder's
    large = {"width": 1024, "height": 1024}
    assert estimate(**large) == 3 * 4 * estimate(low_memory=True, **large)  # three pictures, of four tiles each
