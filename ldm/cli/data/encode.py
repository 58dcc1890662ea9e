"""`ldm data encode`: latents and text embeddings, once instead of in every epoch."""

from typing import Annotated

import typer

from ldm.cli.data.build import read_part
from ldm.cli.data.common import app, progress_of


@app.command(no_args_is_help=True)
def encode(
    path: Annotated[str, typer.Argument(help="a shard folder")],
    model: Annotated[str, typer.Argument(help="a model or run folder with the autoencoder of the coming run")],
    out: Annotated[str, typer.Argument(help="the folder to make; a run reads it with data.cache=OUT")],
    settings: Annotated[list[str] | None, typer.Argument(help="as in the run: size=256 flip=true crops=3 ...")] = None,
    text: Annotated[str | None, typer.Option(help="also embed captions, with the text encoder of this model")] = None,
    part: Annotated[str, typer.Option(help="I/N: only every N-th shard from the I-th on, for job arrays")] = "1/1",
) -> None:
    """Encode the pictures of a shard folder, and with --text its captions. Started again, it goes on where it was.

    The settings are those of the run's data: size, flip, crops, buckets, bucket_step, max_aspect. A run refuses a
    cache that was made of other shards, by other models or with other settings.

    Example: ldm data encode data/mine runs/autoencoder data/mine-latents size=256 flip=true --text runs/text
    """
    import torch  # here, for it takes seconds to import

    from data_pipeline.config import DataConfig
    from ldm.checkpoints.load import load_model
    from ldm.config import load_config
    from ldm.models.autoencoder import AutoencoderKL
    from ldm.training.latents import encode as encode_data

    config = load_config(DataConfig, [], [f"path={path}", *(settings or [])])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (autoencoder,) = load_model(model, ["autoencoder"], dtype=torch.float32).require("autoencoder")
    if not isinstance(autoencoder, AutoencoderKL):
        raise ValueError(f"{model} quantises its latents; a cache keeps the posteriors of a KL autoencoder")
    encoder = load_model(text, ["text"], dtype=torch.float32).require("text")[0].to(device) if text else None
    report = encode_data(config, autoencoder.to(device), encoder, out, read_part(part), progress_of("shards"))
    typer.echo(f"{out}\n{report or f'part {part} is there; the last part completes the folder'}")
