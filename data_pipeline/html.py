"""The frame of every page the project writes: one HTML file that needs no network and no script."""

from collections.abc import Iterable
from html import escape

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""
_STYLE = """:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --good: #2f9e6e; --bad: #c8442f; --bar: #4c7bd9; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
p { margin: 0 0 20px; color: var(--soft); overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; min-width: 0; }
.grid { display: grid; gap: 16px; }
.facts { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.facts b { display: block; font-size: 22px; font-weight: 600; }
.facts span { color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
figure { margin: 0; } figcaption { font-size: 12px; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
td { border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
"""


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page: `title` is text and is escaped; `style`, the page's own rules, and `body` are written as they are.

    Nothing is loaded from anywhere: pictures have to be data.
    """
    start = f"{_HEAD}<title>{escape(title)}</title>\n<style>\n{_STYLE}{style}</style></head><body><main>\n"
    return "".join([start, *body, "</main></body></html>\n"])
