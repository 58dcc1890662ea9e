"""Words that adapters bring along: read as others write them, known while the adapter is on, kept by every verb."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from ldm.adapters import files
from ldm.adapters.adapter import Adapter, Words
from ldm.adapters.algebra import combine, resize
from ldm.adapters.fused import sites
from ldm.adapters.library import Library
from ldm.adapters.lora import AdapterConfig, adapter_of, attached, eject, inject
from ldm.adapters.textual_inversion import forget, learned_words, load_embeddings, teach
from ldm.adapters.tuned import save_word
from ldm.checkpoints import diffusers, textual_inversion
from ldm.checkpoints.files import commit
from ldm.checkpoints.load import save_model
from ldm.checkpoints.textual_inversion import TextualInversion
from ldm.cli.adapter import app
from ldm.pipeline import Pipeline, Request
from tests.checkpoints.families import make
from tests.pipeline.small import small

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LORA = {f"{MODULE}.lora_down.weight": torch.ones(2, 768), f"{MODULE}.lora_up.weight": torch.ones(320, 2)}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: Words, b: Words) -> bool:
    return a.keys() == b.keys() and all(
        len(a[word]) == len(b[word]) and all(map(torch.equal, a[word], b[word])) for word in a
    )


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


ONE, FIRST, SECOND = drawn(0, 3, 768), drawn(1, 2, 768), drawn(2, 2, 1280)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"bundle_emb.zorp.string_to_param.*": ONE}, {"zorp": (ONE,)}),  # AUTOMATIC1111
        ({"bundle_emb.zorp.string_to_param.265": ONE}, {"zorp": (ONE,)}),
        ({"bundle_emb.zorp.emb_params": ONE}, {"zorp": (ONE,)}),
        ({"bundle_emb.zorp.clip_l": ONE[0]}, {"zorp": (ONE[:1],)}),  # ComfyUI's name, one vector
        ({"bundle_emb.<a b>.clip_g": SECOND, "bundle_emb.<a b>.clip_l": FIRST}, {"<a b>": (FIRST, SECOND)}),
        (
            {"bundle_emb.x.clip_g": SECOND, "bundle_emb.x.clip_l": FIRST, "bundle_emb.Zorp.string_to_param.*": ONE},
            {"x": (FIRST, SECOND), "Zorp": (ONE,)},
        ),
        ({"bundle_emb.v1.5.string_to_param.*": ONE}, {"v1.5": (ONE,)}),
    ],
)
def test_words_are_read_and_written_back(tensors: dict[str, Tensor], words: Words, tmp_path: Path) -> None:
    adapter = files.read(saved(tmp_path / "a.safetensors", LORA | tensors))
    assert same(adapter.words, words) and len(adapter.parts["denoiser"]) == 1
    files.write(adapter, tmp_path / "n.safetensors", "native")
    assert same(files.read(tmp_path / "n.safetensors").words, words)
    if "v1.5" in words:
        with pytest.raises(ValueError, match=r"take the word 'v1\.5' to end at its dot; write it as native"):
            files.write(adapter, tmp_path / "k.safetensors", "kohya")
        return
    files.write(adapter, tmp_path / "k.safetensors", "kohya")
    assert same(files.read(tmp_path / "k.safetensors").words, words)
    leaves = {key.rpartition(".")[2] for key in load_file(tmp_path / "k.safetensors") if "bundle_emb.x." in key}
    assert leaves in (set(), {"clip_l", "clip_g"})
    one = {key for key in load_file(tmp_path / "k.safetensors") if re.match(r"bundle_emb\.zorp\.", key)}
    assert one in (set(), {"bundle_emb.zorp.string_to_param.*"})
    for to, name in (("diffusers", "d"), ("peft", "p")):
        with pytest.raises(ValueError, match=f"{to} has no names for learned words, and the adapter brings"):
            files.write(adapter, tmp_path / name, to)
    with pytest.raises(ValueError, match=r"the words of the adapter have no finite numbers in torch\.float16"):
        large = replace(adapter, words={word: (1e6 * ONE,) for word in words})
        files.write(large, tmp_path / "h.safetensors", "kohya", dtype=torch.float16)
    assert not (tmp_path / "h.safetensors").exists()


def test_a_file_of_words_alone(tmp_path: Path) -> None:
    adapter = files.read(saved(tmp_path / "a.safetensors", {"bundle_emb.zorp.emb_params": ONE}))
    assert same(adapter.words, {"zorp": (ONE,)}) and not adapter.parts


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"clip_l": FIRST, "clip_g": SECOND[:1]}, "must be [n, width], not [2, 768] and [1, 1280]"),
        ({"clip_l": FIRST, "t5": SECOND}, "has clip_l, t5; known are"),
        ({"emb_params": ONE, "emb_params_out": ONE}, "has emb_params, emb_params_out; known are"),
        ({"clip_l_out": ONE}, "has clip_l_out; known are"),
        ({"string_to_param.*": torch.ones(1, 2, 3)}, "must be [n, width], not [1, 2, 3]"),
        ({"string_to_param.*": torch.full((1, 3), torch.inf)}, "NaN or infinity, in the word 'zorp'"),
        ({"string_to_param.*": torch.ones(1, 3, dtype=torch.int32)}, "'zorp' are int32, and must be floating-point"),
    ],
)
def test_what_is_no_word_is_refused(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", LORA | {f"bundle_emb.zorp.{leaf}": t for leaf, t in tensors.items()})
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        files.read(path)
    assert said in str(error.value)
    with pytest.raises(ValueError, match="has a space at an end: 'zorp '"):
        files.read(saved(tmp_path / "b.safetensors", LORA | {"bundle_emb.zorp .emb_params": ONE}))


@pytest.mark.parametrize("word", ["a\0b", "a\nb", "x" * 101, "\u00e9" * 51])
def test_names_that_no_file_can_have_are_refused(word: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", LORA | {f"bundle_emb.{word}.emb_params": ONE})
    with pytest.raises(ValueError, match=r"a\.safetensors brings a word that cannot be printed or is over 100 bytes"):
        files.read(path)
    kept = {f"bundle_emb.{'x' * 100}.emb_params": ONE}
    assert list(files.read(saved(tmp_path / "b.safetensors", LORA | kept)).words) == ["x" * 100]


def test_a_file_with_one_word_in_upper_and_in_lower_case_is_refused(tmp_path: Path) -> None:
    """Else which of the two a text encoder learns would be up to their order."""
    tensors = {"bundle_emb.zorp.emb_params": ONE, "bundle_emb.Zorp.emb_params": ONE + 1}
    with pytest.raises(
        ValueError, match=r"a\.safetensors brings the words '(zorp|Zorp)' and '(zorp|Zorp)', which are one"
    ):
        files.read(saved(tmp_path / "a.safetensors", LORA | tensors))


# --- in pictures -------------------------------------------------------------------------------------------------

ZORP, OTHER = drawn(3, 2, 16), drawn(4, 1, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with the word zorp, the same without, one with another word, one with another zorp."""
    home, pipeline = tmp_path_factory.mktemp("words"), small()
    components: dict[str, Any] = {"denoiser": pipeline.denoiser, "text": pipeline.text}
    for seed, names in (
        (0, {"glow": {"zorp": (ZORP,)}, "plain": {}}),
        (1, {"ink": {"pling": (OTHER,)}, "rival": {"Zorp": (OTHER,)}}),
    ):
        torch.manual_seed(seed)
        inject(components, AdapterConfig(rank=2, text=True))
        for module in components.values():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.2 * torch.randn_like(parameter)
        adapter = adapter_of(components)
        eject(components)
        for name, words in names.items():
            files.write(replace(adapter, words=words), home / f"{name}.safetensors", "kohya")  # type: ignore[arg-type]
    return home


@pytest.fixture
def pipeline(folder: Path) -> Pipeline:
    made = small()
    made.adapters = {path.stem: path for path in folder.glob("*.safetensors")}
    return made


def one(prompt: str, **changes: Any) -> Request:
    return Request((prompt,), (7,), **({"steps": 2, "guidance": 3.0, "width": 16, "height": 16} | changes))


def test_a_word_is_known_in_the_prompt_that_asks_for_its_adapter(pipeline: Pipeline) -> None:
    """As if the word were taught by itself beside the same LoRA without it; and forgotten with the adapter."""
    untaught = pipeline(one("a zorp <lora:plain:0.7>"))
    bundled = pipeline(one("a ZORP <lora:glow:0.7>"))
    assert learned_words(pipeline.text) == () and attached(pipeline.library.components) == {}
    teach(pipeline.text, "zorp", ZORP)
    assert torch.equal(pipeline(one("a zorp <lora:plain:0.7>")), bundled)
    forget(pipeline.text, "zorp")
    assert torch.equal(pipeline(one("a zorp <lora:plain:0.7>")), untaught)
    assert (bundled - untaught).abs().max() > 1e-3


def test_every_prompt_has_the_words_of_its_own_adapters(pipeline: Pipeline) -> None:
    prompts = ("a zorp and a pling <lora:glow>", "a zorp and a pling <lora:ink>", "a zorp and a pling")
    asked = Request(prompts, (1, 2, 3), steps=2, width=16, height=16, batch=1)
    images = pipeline(asked)
    for i in range(3):
        alone = pipeline(replace(asked, prompts=prompts[i : i + 1], seeds=asked.seeds[i : i + 1]))
        assert torch.equal(images[i : i + 1], alone)
    both = pipeline(one("a zorp and a pling <lora:glow><lora:ink>"))
    separate = small()
    separate.adapters = {**pipeline.adapters, "glow": pipeline.adapters["plain"]}
    for word, vectors in (("zorp", ZORP), ("pling", OTHER)):
        teach(separate.text, word, vectors)
    assert torch.equal(separate(one("a zorp and a pling <lora:glow><lora:ink>")), both)


def test_an_adapter_that_is_always_on_keeps_its_word(pipeline: Pipeline) -> None:
    pipeline.attach(pipeline.adapters["glow"], 0.5)
    assert learned_words(pipeline.text) == ("zorp",)
    steps: Iterator[Any] = pipeline.stream(one("a zorp <lora:ink>"))
    next(steps)
    assert set(learned_words(pipeline.text)) == {"zorp", "pling"}
    steps.close()  # type: ignore[attr-defined]
    assert learned_words(pipeline.text) == ("zorp",)


def test_a_word_that_does_not_go_with_another_changes_nothing(folder: Path) -> None:
    """The pipeline draws on as before: with what was on, and under the names that were known."""
    pipeline = small()
    pipeline.attach(folder / "glow.safetensors")
    before, names = pipeline(one("a zorp")), pipeline.adapters
    for _ in range(2):
        with pytest.raises(ValueError, match="the word 'Zorp' is brought twice, with different vectors"):
            pipeline.attach(folder / "rival.safetensors")
    assert pipeline.adapters == names and list(attached(pipeline.library.components)) == ["glow"]
    assert torch.equal(pipeline(one("a zorp")), before)


@pytest.mark.parametrize("others", [None, OTHER])
def test_a_word_that_others_forget_is_taught_again(pipeline: Pipeline, others: Tensor | None) -> None:
    """Its own, or that of others, for which it was left out: with the adapter on, the picture is the adapter's."""
    expected = pipeline(one("a zorp <lora:glow>"))
    if others is not None:
        teach(pipeline.text, "zorp", others)
    pipeline.attach(pipeline.adapters["glow"])
    forget(pipeline.text, "zorp")
    assert torch.equal(pipeline(one("a zorp")), expected)
    pipeline.library.use(())
    assert learned_words(pipeline.text) == ("zorp",)


def test_words_are_known_without_their_adapters_meanwhile(pipeline: Pipeline) -> None:
    teach(pipeline.text, "pling", ZORP)
    with pipeline.library.teaching((("glow", 1.0), ("ink", 1.0))):
        assert pipeline.text.words.vectors["pling"] is ZORP and torch.equal(pipeline.text.words.vectors["zorp"], ZORP)
        assert not attached(pipeline.library.components)
    assert learned_words(pipeline.text) == ("pling",)


def test_what_others_taught_stays(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    teach(pipeline.text, "Zorp", OTHER)
    with caplog.at_level(logging.WARNING):
        mine = pipeline(one("a zorp <lora:glow>"))
    assert "the word 'zorp' is known already; what an adapter brings for it is left out" in caplog.text
    assert torch.equal(pipeline(one("a zorp <lora:plain>")), mine)
    assert pipeline.text.words.vectors["zorp"] is OTHER
    forget(pipeline.text, "zorp")
    steps: Iterator[Any] = pipeline.stream(one("a zorp <lora:glow>"))
    next(steps)
    teach(pipeline.text, "zorp", OTHER)  # while the adapter is on
    steps.close()  # type: ignore[attr-defined]
    assert pipeline.text.words.vectors["zorp"] is OTHER


def test_the_two_encoders_of_sdxl_learn_a_word_together(tmp_path: Path) -> None:
    """Each its own vectors, as if they were taught by hand; what is no pair is refused."""
    components: dict[str, Any] = {name: make("sdxl").components[name] for name in ("denoiser", "text")}
    inject(components, AdapterConfig(rank=1))
    adapter, pair = adapter_of(components), (drawn(5, 2, 16), drawn(6, 2, 24))
    eject(components)
    files.write(replace(adapter, words={"zorp": pair}), tmp_path / "a.safetensors", "kohya")
    files.write(replace(adapter, words={"zorp": pair[:1]}), tmp_path / "b.safetensors", "kohya")
    text, library = components["text"], Library(components)
    library.paths = {name: tmp_path / f"{name}.safetensors" for name in "ab"}
    plain = text(["a zorp"])
    library.use((("a", 1.0),))
    told = text(["a zorp"])
    library.use(())
    assert torch.equal(text(["a zorp"]).context, plain.context) and learned_words(text) == ()
    teach(text, "zorp", pair)
    expected = text(["a zorp"])
    assert torch.equal(told.context, expected.context) and torch.equal(told.pooled, expected.pooled)
    assert all(
        (told.context - plain.context).flatten(0, 1)[:, part].abs().max() > 1e-3 for part in (slice(16), slice(16, 40))
    )
    with pytest.raises(ValueError, match=r"'zorp', 16 wide; the text encoder of this model reads 16 \+ 24"):
        library.check((("b", 1.0),))


def test_words_that_cannot_be_are_refused_before_any_work(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the word 'Zorp' is brought twice, with different vectors"):
        pipeline.stream(one("a zorp <lora:glow><lora:rival>"))
    adapter = files.read(pipeline.adapters["glow"], pipeline.library.components)
    for words, said in (
        ({"x": (drawn(0, 1, 17),)}, "it brings the word 'x', 17 wide; the text encoder of this model reads 16"),
        ({"x": (OTHER, OTHER)}, "16 + 16 wide; the text encoder of this model reads 16"),
        ({"x": (drawn(0, 11, 16),)}, "the word 'x' of 11 vectors; a prompt holds 10"),
    ):
        path = tmp_path / "bad.safetensors"
        files.write(replace(adapter, words=words), path, "kohya")
        fresh = small()
        with pytest.raises(ValueError, match=re.escape(said)):
            fresh.attach(path)
        assert not fresh.adapters and not attached(fresh.library.components) and not learned_words(fresh.text)


# --- computed with -----------------------------------------------------------------------------------------------


def test_words_go_with_the_factors(folder: Path) -> None:
    components = small().library.components
    glow, ink, rival = (files.read(folder / f"{name}.safetensors", components) for name in ("glow", "ink", "rival"))
    assert same(resize(glow, 1).words, {"zorp": (ZORP,)})
    both = combine([(glow, 0.5), (ink, -1.0), (glow, 2.0)], rank=1)
    assert same(both.words, {"zorp": (ZORP,), "pling": (OTHER,)})
    with pytest.raises(ValueError, match="the word 'Zorp' is brought twice"):
        combine([(glow, 1.0), (rival, 1.0)])


def ldm(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_verbs_keep_words_or_write_them_beside(tmp_path: Path) -> None:
    model = make("sd1")
    diffusers.write(model, tmp_path / "model")
    components: dict[str, Any] = {name: model.components[name] for name in ("denoiser", "text")}
    inject(components, AdapterConfig(rank=3))
    adapter: Adapter = replace(adapter_of(components), words={"zorp": (ZORP,), "a/b": (OTHER,)})
    source = tmp_path / "a.safetensors"
    files.write(adapter, source, "kohya")
    assert "brings the word 'zorp': 2 vectors, 16 wide" in ldm("inspect", source)
    ldm("resize", source, tmp_path / "r.safetensors", "--rank", 2)
    ldm("combine", source, source, "--out", tmp_path / "c.safetensors")
    ldm("convert", source, tmp_path / "n.safetensors", "--to", "native")
    for name in ("r", "c", "n"):
        assert same(files.read(tmp_path / f"{name}.safetensors").words, adapter.words)
    for place, command in (
        (tmp_path / "d", lambda at: ldm("convert", source, at / "out", "--to", "diffusers")),
        (tmp_path / "p", lambda at: ldm("convert", source, at / "out", "--to", "peft")),
        (tmp_path / "m", lambda at: ldm("merge", tmp_path / "model", source, "--out", at / "out")),
    ):
        place.mkdir()
        said = command(place)
        assert "zorp.safetensors: the word 'zorp' by itself, which" in said
        own = place / "embeddings"  # never in the place of the adapter, which often has the name of its word
        assert {path.name for path in own.iterdir()} == {"zorp.safetensors", "a-b.safetensors"}
        assert {path.name for path in place.iterdir()} == {"out", "embeddings"}
        for file, word, vectors in (("zorp", "zorp", ZORP), ("a-b", "a/b", OTHER)):
            found = textual_inversion.read(own / f"{file}.safetensors")
            assert found.word == word and torch.equal(found.vectors[0], vectors)
        assert load_embeddings(make("sd1").components["text"], own / "zorp.safetensors") == ["zorp"]
    there = {path: path.read_bytes() for path in (tmp_path / "d" / "embeddings").iterdir()}
    assert "by itself" not in ldm("convert", source, tmp_path / "d" / "again", "--to", "diffusers")  # they are there
    assert {path: path.read_bytes() for path in (tmp_path / "d" / "embeddings").iterdir()} == there
    files.write(replace(adapter, words={"a/b": (OTHER + 1,)}), tmp_path / "other.safetensors", "kohya")
    with pytest.raises(ValueError, match=r"a-b\.safetensors, which exists; nothing is overwritten"):
        ldm("convert", tmp_path / "other.safetensors", tmp_path / "d" / "third", "--to", "diffusers")
    assert not (tmp_path / "d" / "third").exists()


def test_a_file_of_words_alone_is_called_so(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.safetensors", {"bundle_emb.zorp.emb_params": ONE})
    assert ldm("inspect", source).splitlines() == [
        f"{source}: words alone",
        "brings the word 'zorp': 3 vectors, 768 wide",
    ]
    copy = tmp_path / "b.safetensors"
    assert ldm("convert", source, copy, "--to", "kohya") == f"{copy}: words alone\n"
    assert same(files.read(copy).words, {"zorp": (ONE,)})
    for to in ("diffusers", "peft"):
        with pytest.raises(ValueError, match=f"the adapter changes no layer: there is nothing in it that {to} has"):
            ldm("convert", source, tmp_path / to, "--to", to)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_a_models_own_word_is_kept(tmp_path: Path) -> None:
    """A model folder with a word beside its weights: merged it goes to a file, extracted into the adapter."""
    model = make("sd1")
    torch.manual_seed(0)
    for name, own in (("base", False), ("tuned", True)):
        with commit(tmp_path / name) as stage:
            save_model(stage, model.components, model.settings, name)
            if own:
                save_word(TextualInversion("Zorp", (ZORP,)), stage / textual_inversion.WORD)
        sites(model.components["denoiser"])["down.0.layers.0.attention.blocks.0.attn2.to_k"].data += 0.1
    ldm("extract", tmp_path / "tuned", tmp_path / "base", tmp_path / "a.safetensors", "--rank", 1)
    adapter = files.read(tmp_path / "a.safetensors", {name: model.components[name] for name in ("denoiser", "text")})
    assert same(adapter.words, {"Zorp": (ZORP,)}) and adapter.parts
    files.write(replace(adapter, words={"pling": (OTHER,)}), tmp_path / "b.safetensors", "kohya")
    (tmp_path / "m").mkdir()
    said = ldm("merge", tmp_path / "tuned", tmp_path / "b.safetensors", "--out", tmp_path / "m" / "out")
    assert "Zorp.safetensors: the word 'Zorp' by itself" in said and "pling.safetensors: the word 'pling'" in said
    text = make("sd1").components["text"]
    assert load_embeddings(text, tmp_path / "m" / "embeddings") == ["zorp", "pling"]
    assert torch.equal(text.words.vectors["zorp"], ZORP)
    files.write(replace(adapter, words={"zorp": (OTHER,)}), tmp_path / "c.safetensors", "kohya")
    with pytest.raises(ValueError, match="the word 'zorp' is brought twice, with different vectors"):
        ldm("merge", tmp_path / "tuned", tmp_path / "c.safetensors", "--out", tmp_path / "m" / "other")


def test_two_files_of_one_word_with_equal_vectors_are_one(tmp_path: Path) -> None:
    """What a run shares with other programs holds its word twice."""
    text = small().text
    textual_inversion.write(TextualInversion("zorp", (ZORP,)), tmp_path / "zorp.safetensors", "native")
    textual_inversion.write(TextualInversion("Zorp", (ZORP,)), tmp_path / "learned_embeds.safetensors", "diffusers")
    assert load_embeddings(text, tmp_path) == ["zorp"] and torch.equal(text.words.vectors["zorp"], ZORP)
    textual_inversion.write(TextualInversion("zorp", (ZORP[:1],)), tmp_path / "z.safetensors", "diffusers")
    with pytest.raises(ValueError, match="both teach the word 'zorp', with different vectors"):
        load_embeddings(text, tmp_path)
