"""Finds the score in a judge's answer, and never a bound of the scale that the answer mentions.

Markdown and quotes are ignored. The score is the number behind the last `score`, `rating`, `grade`, `mark` or
`verdict`, else the last number before `/10` or `out of 10`, else the only number. What describes the scale does not
count: `1 to 10`, `1-10`, `/10`, `out of 10`, `maximum 10`, `10-point scale`, `10 being the best`.
"""

from __future__ import annotations

import regex

_NUM = r"\d+(?:[.,]\d+)?"
_MARKUP = regex.compile(r"</\w+>|[*_`~#|<>\[\]{}\"“”\\]+|\\?boxed")
_RANGE = regex.compile(
    rf"between\s+{_NUM}\s+and\s+{_NUM}|(?<![\w.]){_NUM}\s*(?:to|through|-|–|—|\.\.+)\s*{_NUM}(?!\w)",
    regex.IGNORECASE,
)
_SCALE = regex.compile(
    rf"""
    (?:max(?:imum)?|min(?:imum)?|perfect|full|highest|lowest|best|worst|possible|top)   # maximum score of 10
      (?:\s+(?:possible|score|rating|grade|mark|marks|points?))?(?:\s*(?:of|is|:|=|being))*\s*{_NUM}
    | scale\s+(?:of|from)\s+{_NUM}
    | {_NUM}[-\s]+points?\s+scale
    | (?:where\s+)?{_NUM}\s*(?:=|is|being|means|meaning)\s+(?:the\s+|an?\s+)?[a-z]+        # 10 is best
    """,
    regex.VERBOSE | regex.IGNORECASE,
)
_OF = rf"\s*(?:/|out\s+of|of)\s*{_NUM}"
_NAMED = regex.compile(
    rf"(?:score|rating|rate|grade|mark|verdict)[sd]?\b[^\d.;!?]{{0,40}}?(?<number>(?<![^\s:=(])-?{_NUM})",
    regex.IGNORECASE,
)
_BEFORE_SCALE = regex.compile(rf"(?<number>(?<![\w.])-?{_NUM}){_OF}", regex.IGNORECASE)
_ANY = regex.compile(rf"(?<number>(?<![\w.])-?{_NUM})(?!\w)")
_BOUND = regex.compile(rf"(?<={_NUM}){_OF}|\bout\s+of\s+{_NUM}", regex.IGNORECASE)


def score_in(answer: str) -> float | None:
    """Return the score in a judge's answer, or None if there is none or it is not clear which number it is."""
    text = _SCALE.sub(" ", _RANGE.sub(" ", _MARKUP.sub(" ", answer)))
    before_scale = [match["number"] for match in _BEFORE_SCALE.finditer(text)]
    plain = _BOUND.sub(" ", text)
    named = [match["number"] for match in _NAMED.finditer(plain)]
    anywhere = {match["number"] for match in _ANY.finditer(plain)}
    found = named[-1:] or before_scale[-1:] or (list(anywhere) if len(anywhere) == 1 else [])
    return float(found[0].replace(",", ".")) if found else None
