"""Write a transcript as one self-contained HTML file, without scripts, fonts or links.

Escapes all text of the conversation, which is untrusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from cluster.errors import InputError
from deploy.commands.history.transcript import Span, Token, Transcript
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
.good { background: rgb(var(--good) / var(--opacity)); } .bad { background: rgb(var(--bad) / var(--opacity)); }
details { margin-top: .4rem; } summary { cursor: pointer; color: var(--dim); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--dim); font-weight: normal; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; }
"""
COLUMNS = ("token", "value", "advantage", "log-probability", "its change")
MAX_OPACITY = 0.55
"""Opacity of the background of the token with the largest absolute advantage."""


def write_page(transcript: Transcript, path: Path) -> None:
    """Write the page. Raises InputError if the file cannot be written."""
    try:
        path.write_text("".join(_page(transcript)), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError("--html", f"{path} cannot be written ({error.strerror})") from error


def _page(transcript: Transcript) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<title>{_text(transcript.trajectory.uid)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    yield f'<h1>{_text(transcript.heading())}</h1>\n<p class="dim">{_text(transcript.comparison)}. '
    yield "A token is green if its advantage is above 0 and red if it is below.</p>\n"
    largest = max((abs(token.advantage) for span in transcript.spans for token in span.tokens), default=0.0)
    for span in transcript.spans:
        yield from _span(span, largest)
    first, *others = transcript.summary()
    yield f"<h2>{_text(first)}</h2>\n" + "".join(f"<div>{_text(line)}</div>\n" for line in others)
    yield "</body>\n</html>\n"


def _span(span: Span, largest: float) -> Iterator[str]:
    kind = "sampled" if span.is_sampled else "given"
    yield f'<h2 class="{kind}">{_text(span.heading())}</h2>\n<pre class="{kind}">'
    if not span.is_sampled:
        yield f"{_text(span.text)}</pre>\n"
        return
    yield "".join(_colored(token, largest) for token in span.tokens) + "</pre>\n"
    yield '<details><summary>token by token</summary>\n<div class="wide"><table>\n<thead><tr>'
    yield "".join(f'<th scope="col">{name}</th>' for name in COLUMNS) + "</tr></thead>\n<tbody>\n"
    for token in span.tokens:
        numbers = (f"{token.value:.4f}", f"{token.advantage:+.4f}", f"{token.before:.4f}", f"{token.change:+.4f}")
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        yield f"<tr><td>{_text(repr(token.text)[1:-1])}</td>{cells}</tr>\n"
    yield "</tbody>\n</table></div></details>\n"


def _colored(token: Token, largest: float) -> str:
    opacity = MAX_OPACITY * abs(token.advantage) / largest if largest else 0.0
    kind = "good" if token.advantage >= 0 else "bad"
    values = f"value {token.value:.4f}, advantage {token.advantage:+.4f}, log-probability {token.before:.4f}"
    style, title = f"--opacity:{opacity:.3f}", f"{values} {token.change:+.4f}"
    return f'<span class="{kind}" style="{style}" title="{title}">{_text(token.text)}</span>'


def _text(text: str) -> str:
    return escape(visible(text))
