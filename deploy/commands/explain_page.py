"""A conversation as one HTML file that needs nothing else: no script, no font, no address of anybody.

Whatever was said is hostile text and is written as text. Knows no run.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from cluster.errors import InputError
from deploy.commands.explain_story import Part, Story, Token
from deploy.terminal.text import visible

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --dim: #5b6570; --line: #d8dee4; --given: #f4f6f8;
  --good: 26 127 55; --bad: 207 34 46; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1317; --ink: #e6e9ec; --dim: #9aa4ae; --line: #303840;
  --given: #171d23; --good: 63 185 80; --bad: 248 81 73; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; } h2 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.dim, h2.given { color: var(--dim); font-weight: normal; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .6rem .8rem; border: 1px solid var(--line);
  border-radius: 6px; font: 14px/1.7 ui-monospace, monospace; }
pre.given { background: var(--given); color: var(--dim); }
.good { background: rgb(var(--good) / var(--much)); } .bad { background: rgb(var(--bad) / var(--much)); }
details { margin-top: .4rem; } summary { cursor: pointer; color: var(--dim); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--dim); font-weight: normal; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
"""
COLUMNS = ("token", "value", "advantage", "log-probability", "its change")
MOST = 0.55
"""How opaque the token of the largest advantage is painted."""


def write_page(story: Story, path: Path) -> None:
    """Write it. Raises InputError naming the file that cannot be written."""
    try:
        path.write_text("".join(_page(story)), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError("--html", f"{path} cannot be written ({error.strerror})") from error


def _page(story: Story) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<title>{_text(story.trajectory.uid)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    yield f'<h1>{_text(story.heading())}</h1>\n<p class="dim">{_text(story.same)}. A token is green where its '
    yield "advantage is above 0, red where it is below.</p>\n"
    largest = max((abs(token.advantage) for part in story.parts for token in part.tokens), default=0.0)
    for part in story.parts:
        yield from _part(part, largest)
    first, *others = story.ends()
    yield f"<h2>{_text(first)}</h2>\n" + "".join(f"<div>{_text(line)}</div>\n" for line in others)
    yield "</body>\n</html>\n"


def _part(part: Part, largest: float) -> Iterator[str]:
    kind = "said" if part.is_sampled else "given"
    yield f'<h2 class="{kind}">{_text(part.heading())}</h2>\n<pre class="{kind}">'
    if not part.is_sampled:
        yield f"{_text(part.text)}</pre>\n"
        return
    yield "".join(_painted(token, largest) for token in part.tokens) + "</pre>\n"
    yield '<details><summary>token by token</summary>\n<div class="wide"><table>\n<thead><tr>'
    yield "".join(f'<th scope="col">{name}</th>' for name in COLUMNS) + "</tr></thead>\n<tbody>\n"
    for token in part.tokens:
        numbers = (f"{token.value:.4f}", f"{token.advantage:+.4f}", f"{token.before:.4f}", f"{token.change:+.4f}")
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        yield f"<tr><td>{_text(repr(token.text)[1:-1])}</td>{cells}</tr>\n"
    yield "</tbody>\n</table></div></details>\n"


def _painted(token: Token, largest: float) -> str:
    much = MOST * abs(token.advantage) / largest if largest else 0.0
    kind = "good" if token.advantage >= 0 else "bad"
    told = f"value {token.value:.4f}, advantage {token.advantage:+.4f}, log-probability {token.before:.4f}"
    style, title = f"--much:{much:.3f}", f"{told} {token.change:+.4f}"
    return f'<span class="{kind}" style="{style}" title="{title}">{_text(token.text)}</span>'


def _text(text: str) -> str:
    return escape(visible(text))
