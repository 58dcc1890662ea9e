"""`ldm finetune`."""

import itertools
import json
import logging
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ldm.training.methods import FinetuningTaskConfig
    from ldm.training.preparing import Subject
    from ldm.training.run import RunConfig

LOOKS = 10
"""How often, over a run, it is saved, validated and pictured."""
PREVIEWS, LOOKED_AT = 4, 64
"""Captions that are pictured, each beside an unrelated prompt; and that a word to teach is looked for in."""
CONDITIONED = ("controlnet", "t2i_adapter")
"""Methods whose model goes by another picture: the edges of the picture itself unless others are given."""


def finetune(
    method: Annotated[
        str,
        typer.Argument(
            help="full, lora, dora, loha, lokr, dreambooth, textual-inversion, controlnet, t2i-adapter, inpainting "
            "or instruct"
        ),
    ],
    model: Annotated[str, typer.Argument(help="the base: a model file or folder of any format, or a run folder")],
    pictures: Annotated[str, typer.Argument(help="a folder of pictures, captioned or not, or of shards")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value...]", help="of the run: data.size=512 samples=4000 ...")
    ] = None,
    out: Annotated[str, typer.Option(help="the folder of the run; run again, it goes on")] = "",
    caption: Annotated[str, typer.Option(help="of pictures that have none: 'photo of sks dog'")] = "",
    word: Annotated[str, typer.Option(help="a word to teach: textual-inversion, or learned with an adapter")] = "",
    class_prompt: Annotated[
        list[str] | None, typer.Option(help="what the subject is one of: 'photo of a dog'; repeat it for more")
    ] = None,
    class_prompts: Annotated[Path | None, typer.Option(help="a file of such prompts, one a line")] = None,
    class_pictures: Annotated[
        int | None, typer.Option(help="how many of those the model draws itself, once; one each, and 100 at least")
    ] = None,
    class_folder: Annotated[str, typer.Option(help="pictures of the class that you have, in place of drawn ones")] = "",
    unrelated: Annotated[
        list[str] | None, typer.Option(help="a prompt of something else, watched for being forgotten; repeat it")
    ] = None,
    conditions: Annotated[str, typer.Option(help="a folder with another picture for each: what to go by")] = "",
    masks: Annotated[str, typer.Option(help="a folder with a mask for each, white where it counts; or alpha")] = "",
    holdout: Annotated[float | None, typer.Option(help="pictures kept for validation: a number, or a share")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would take, and stop.")] = False,
) -> None:
    """Teach a model from your pictures: a subject, a style, or to be steered, to fill in, to edit.

    The pictures are taken as they are, encoded once, and trained on by the loop of `ldm train`; key=value reach its
    config. Of 5 pictures and more some are held out: the checkpoint with the lowest loss on them is kept and shared.

    Example: ldm finetune lora MODEL my-dog --caption "photo of sks dog" --out runs/sks
    """
    from data_pipeline.shards import INDEX
    from ldm.checkpoints.files import steps
    from ldm.cli.train import go
    from ldm.training.preparing import Subject, kind_of_base
    from ldm.training.recipes import UNRELATED, settings_of, steps_of
    from ldm.training.run import cost, describe, main_first

    finished = Path(pictures, INDEX).is_file()
    if method == "textual-inversion" and not word:
        raise ValueError("textual-inversion needs --word, the word that it teaches")
    subject = Subject(
        pictures, caption, conditions, masks, holdout, _prompts(class_prompt or [], class_prompts), class_pictures,
        class_folder, tuple(unrelated or UNRELATED),
    )  # fmt: skip
    if word and not caption and not finished:
        subject = replace(subject, caption=f"a photo of {word}")
    if method == "dreambooth" and not subject.has_class:
        raise ValueError(
            "dreambooth needs --class-prompt, --class-prompts or --class-folder: what the subject is one of"
        )
    words = settings_of(method, word=bool(word), has_class=subject.has_class)
    given = [f"out={_quoted(out or f'runs/{method}-{Path(pictures).resolve().name}')}", f"task.model={_quoted(model)}"]
    given += [f"task.word={_quoted(word)}"] if word else []
    config = _config([*words, *given], settings or [], pictures, steps_of(method))
    kind = kind_of_base(_task(config).model)
    _check(method, config, subject, kind)
    if config.validation and not finished:
        subject = replace(subject, holdout=0)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            typer.echo(describe(_on_shards(config, subject, Path(folder))))
        return
    with main_first(config) as main:
        config = _on_shards(config, subject, Path(config.out))
        if main and not steps(Path(config.out) / "checkpoints"):
            logging.getLogger(__name__).info("%s", cost(config))  # refuses what cannot be before anything is drawn
        config = _on_drawn(config, subject, kind)
    if go(config):
        _share(config)


def _config(given: list[str], settings: list[str], pictures: str, length: int) -> "RunConfig":
    """The run's config but for its data: the recipe's words, then the user's, which win. `length`: steps."""
    import torch

    from ldm.checkpoints.load import load_model
    from ldm.config import load_config
    from ldm.training.methods import PARTIAL
    from ldm.training.run import RunConfig

    config = load_config(RunConfig, [], [*given, f"data.path={_quoted(pictures)}", *settings])
    if config.data.path != pictures or config.data.repeats or config.data.weights or config.data.prior:
        raise ValueError("data.path, repeats, weights and prior follow from PICTURES and the class: leave them out")
    said = {setting.partition("=")[0] for setting in settings}
    changes: dict[str, Any] = {} if "samples" in said else {"samples": length * config.batch_size}
    every = max(1, changes.get("samples", config.samples) // config.batch_size // LOOKS)
    own = {"save_steps": every, "validate_steps": every, "preview_steps": every, "log_steps": min(20, every)}
    changes |= {name: value for name, value in own.items() if name not in said}
    if "precision" not in said and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False):
        changes["precision"] = "bf16"
    data, base = config.data, load_model(_task(config).model, []).settings  # refuses what is no model at once
    if data.size is None:
        data = replace(data, size=int(base.get("size", 512)))
    if _task(config).method in CONDITIONED and not data.condition:
        data = replace(data, condition="edges")
    config = replace(config, data=data, **changes)
    if config.precision != "no" and _task(config).method in PARTIAL and "task.held" not in said:
        config = replace(config, task=replace(_task(config), held=config.precision))
    return config


def _prompts(given: list[str], file: Path | None) -> tuple[str, ...]:
    """Those that are given, and those of the file's lines. Raises ValueError for a file that has none."""
    if file is None:
        return tuple(given)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-prompts {file} is no file of text: {error}") from error
    if not any(lines):
        raise ValueError(f"--class-prompts {file} has no prompts: write one a line")
    return (*given, *filter(None, lines))


def _quoted(text: str) -> str:
    """The text as a string of YAML, whatever it holds."""
    return json.dumps(text, ensure_ascii=False)  # of an escaped emoji YAML reads two halves


def _check(method: str, config: "RunConfig", subject: "Subject", kind: str) -> None:
    """Raise ValueError for what does not go together. kind: of the base."""
    from ldm.models.words import says
    from ldm.training.methods import PARTIAL

    tuned = _task(config).method
    edits = tuned == "instruct" or kind == "editing"
    if edits and not (subject.conditions or config.data.condition):
        raise ValueError(f"{method} needs --conditions, a folder with the picture before each edit")
    if subject.conditions and not edits and tuned not in CONDITIONED:
        raise ValueError(
            f"--conditions are for controlnet, t2i-adapter, instruct and models for editing, not for {method}"
        )
    word = _task(config).word
    if said := [prompt for prompt in subject.class_prompts if word and says(prompt, word)]:
        raise ValueError(
            f"the class prompt {said[0]!r} says {word!r}, which the base does not know: leave it out there"
        )
    if subject.has_class and tuned in PARTIAL and tuned != "adapter":
        raise ValueError(f"{method} leaves the base as it is, and nothing is forgotten: leave the class out")
    if subject.class_prompts and kind == "editing":
        raise ValueError("--class-prompt is drawn by the base, and this one, for editing, draws nothing by itself")
    if subject.holdout is not None and config.validation:
        raise ValueError("--holdout keeps pictures for validation, and validation= names others: give one of them")
    for prompt in subject.unrelated:
        if not _writable(prompt):
            raise ValueError(f"--unrelated {prompt!r} cannot be written into a config")


def _writable(text: str) -> bool:
    """Whether a config can hold it: these words have a meaning there, and are refused when it is read again."""
    return "${" not in text and text != "???"


def _task(config: "RunConfig") -> "FinetuningTaskConfig":
    """What the config is of."""
    from ldm.training.methods import FinetuningTaskConfig

    assert isinstance(config.task, FinetuningTaskConfig)
    return config.task


def _on_shards(config: "RunConfig", subject: "Subject", place: Path) -> "RunConfig":
    """The config with the subject's pictures as shards below `place`, and what the previews show."""
    from ldm.models.words import says
    from ldm.training.preparing import captions, prepare

    if subject.conditions:
        config = replace(config, data=replace(config.data, condition="stored"))
    data, validation = prepare(subject, config.data, config.batch_size, place)
    task = _task(config)
    word, found = task.word, captions(data, LOOKED_AT)
    if word and not any(says(caption, word) for caption in (*data.templates, *found)):
        raise ValueError(f"no caption says {word!r}, which is to be taught: write it into the captions")
    shown = sorted(filter(_writable, found), key=lambda caption: bool(word) and not says(caption, word))
    previews = task.previews or tuple(shown[:PREVIEWS])
    unrelated = task.unrelated or tuple(itertools.islice(itertools.cycle(subject.unrelated), len(previews)))
    task = replace(task, previews=previews, unrelated=unrelated)
    return replace(config, data=data, task=task, validation=config.validation or validation)


def _on_drawn(config: "RunConfig", subject: "Subject", kind: str) -> "RunConfig":
    """The config with what the base model draws for it, and with latents computed before, in the run's folder."""
    from ldm.training.preparing import cached, forgets, forgetting, with_class

    out, task, data = Path(config.out), _task(config), config.data
    data = cached(task, with_class(subject, task.model, data, out, task.preview_guidance), out)
    kept = config.forgetting
    if not kept and forgets(task, kind) and data.size:
        kept = forgetting(subject, task.model, data.size, out, task.preview_guidance)
    return replace(config, data=data, forgetting=kept)


def _share(config: "RunConfig") -> None:
    """Write what others can use, and say where, and how to draw with it."""
    from data_pipeline.reader import ShardReader
    from ldm.training.preparing import captions
    from ldm.training.sharing import chosen, share

    task, out, best = _task(config), Path(config.out), chosen(Path(config.out))
    known = config.data.prior or (False,) * len(config.data.paths)
    facts = {
        "sd_model_name": Path(task.model).name,
        "learning_rate": config.optimizer.lr,
        "optimizer": config.optimizer.kind,
        "lr_scheduler": config.optimizer.schedule,
        "steps": int(best.name.removeprefix("step-")),
        "total_batch_size": config.batch_size,
        "mixed_precision": config.precision,
        "seed": config.seed,
        "resolution": f"{config.data.size}x{config.data.size}",
        "num_train_images": sum(
            len(ShardReader(path)) for path, old in zip(config.data.paths, known, strict=True) if not old
        ),
    }
    typer.echo(f"chosen: {best}")
    for path in share(out, facts):
        typer.echo(f"to share: {path}")
    prompt = (task.previews or captions(config.data, 1))[0]
    words = [str(best), prompt]
    if task.method in CONDITIONED:
        words = [task.model, prompt, "--control", f"{best}=PICTURE"]
    elif task.method in ("inpainting", "instruct"):
        words += ["--image", "PICTURE"]
    typer.echo(f"draw with it: ldm generate {shlex.join(words)}")
