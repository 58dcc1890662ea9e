"""A folder of drawn pictures as one HTML page that needs no network and no script."""

import base64
import io
import logging
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

log = logging.getLogger(__name__)

SIDE = 320  # of a thumbnail, px
NOT_SHOWN = ("preview.png",)
_STYLE = """main { max-width: 1400px; padding-top: 28px; }
h1 { font-size: 24px; margin-bottom: 18px; }
h1 span { color: var(--soft); font-weight: 400; font-size: 15px; }
.grid { grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); align-items: start; }
figure { background: #fff; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure a { display: flex; align-items: center; justify-content: center; background: #f0f2f5; min-height: 180px; }
img { max-width: 100%; height: auto; display: block; }
figcaption { padding: 10px 14px 14px; font-size: 14px; }
figcaption b { display: block; white-space: pre-wrap; }
figcaption i { color: var(--soft); }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 10px; margin: 8px 0 0; font-size: 12px; }
dt { color: var(--soft); } dd { margin: 0; }
"""


def write_page(folder: Path) -> Path:
    """Write FOLDER/index.html: every PNG in it as a thumbnail that opens the file, with its settings below.

    Also of earlier runs and of other programs. A file that cannot be read is left out with a warning.
    """
    from data_pipeline.html import document
    from ldm.checkpoints.files import commit_file

    figures = []
    for path in sorted(folder.glob("*.png")):
        if path.name in NOT_SHOWN or path.name.startswith("."):
            continue
        try:
            figures.append(_figure(path))
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
            log.warning("not on the page: %s (%s)", path, error)
    name = folder.resolve().name
    body = [f"<h1>{escape(name)} <span>{len(figures)} pictures</span></h1>", '<div class="grid">', *figures, "</div>"]
    target = folder / "index.html"
    with commit_file(target) as stage:
        stage.write_text(document(name, _STYLE, body), encoding="utf-8", errors="replace")
    return target


def _figure(path: Path) -> str:
    from PIL import Image

    from ldm.images import legible, read_settings

    settings = read_settings(path)
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = legible(small)
    thumbnail = io.BytesIO()
    small.save(thumbnail, "JPEG", quality=88)
    data = base64.b64encode(thumbnail.getvalue()).decode()
    link = escape(quote(path.name))
    picture = f'<a href="{link}"><img alt="" width="{small.width}" src="data:image/jpeg;base64,{data}"></a>'
    return f"<figure>{picture}<figcaption>{_caption(path.name, settings)}</figcaption></figure>\n"


def _caption(name: str, settings: Mapping[str, Any]) -> str:
    """The prompt, the negative one, and the rest of the settings as a list."""
    rest = {"File": name} | {k: v for k, v in settings.items() if k not in ("Prompt", "Negative prompt")}
    lines = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in rest.items())
    negative = settings.get("Negative prompt")
    words = f"<b>{escape(str(settings.get('Prompt', '')))}</b>"
    return words + (f"<i>not: {escape(str(negative))}</i>" if negative else "") + f"<dl>{lines}</dl>"
