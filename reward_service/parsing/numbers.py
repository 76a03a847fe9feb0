"""Reads numbers in texts by one grammar, for the scorers that compare numbers.

A number is an optional sign, an optional currency sign behind it, and one of

- digits with an optional decimal part behind a full stop: `12`, `12.5`, `.5`. Thousands may be grouped by one of
  comma, LaTeX's `{,}` or `\\,`, apostrophe, underscore, or a no-break, narrow no-break, thin or figure space; an
  ordinary space does not group. Commas may also group as in `12,34,567`, full stops as in `1.000.000` and, if a comma
  follows, as in `1.234,50`. `1,2,300` and `28.11.2025` are three numbers;
- an exponent behind it: `1.5e3`, `1.5 × 10^3`, `1.5 \\times 10^{-3}`, `1.5 × 10³`, `1.5*10**3`; a power alone: `10^3`;
- a fraction: `3/4`, `1 1/2`, `\\frac{3}{4}`, `\\frac34`, `½`, `1½`; `12/11/2025` is three numbers.

A percent sign, or the word percent, behind it divides by 100. A sign is a hyphen, a minus sign, another dash or a plus,
directly in front of the number, or with a space between them behind `=` or an opening bracket; behind a letter, a
digit, a closing bracket, a percent sign or a dash it joins two words or numbers: `3-5` ends with 5.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import regex

_MINUS = "-−‐‑‒–—﹣－"
_SIGN = f"[{_MINUS}+＋]"
_GROUP = r"(?:,|\{,\}|\\,|['’_\u00a0\u202f\u2009\u2007])"
_GROUPED = (
    rf"(?<!\d,)\d{{1,3}}(?:(?P<group>{_GROUP})\d{{3}}(?:(?P=group)\d{{3}})*)(?!\d)|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)"
)
_DOTTED = r"(?<!\d\.)\d{1,3}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})(?![\d.,]*\d)"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_OF_TEN = r"10(?:(?:\^|\*\*)\{{?(?P<power{0}>{sign}?\d+)\}}?|(?P<raised{0}>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+))"
_POWER = rf"\s?(?:×|x|\*|·|\\times|\\cdot)\s?{_OF_TEN.format('', sign=_SIGN)}"
_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_VULGAR = "[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒]"

NUMBER = (
    rf"(?:(?<![^\W_]|[{_MINUS})\]}}%])(?P<sign>{_SIGN})(?:(?<=[=({{\[$≈<>]\s?.)\ )?(?:(?<!\$.)\\?[$€£¥])?)?"
    r"(?:"
    rf"\\[dtc]?frac\s?(?:\{{(?P<upper>{_SIGN}?{_DECIMAL})\}}|(?P<upper>\d))(?:\{{(?P<lower>{_DECIMAL})\}}|(?P<lower>\d))"
    rf"|(?<![\d.]){_OF_TEN.format('_alone', sign=_SIGN)}"
    rf"|(?P<whole>\d+)?(?P<vulgar>{_VULGAR})"
    rf"|(?<!\d/)(?:(?P<units>\d+)\ )?(?P<numerator>{_DECIMAL})\ ?[/⁄]\ ?(?P<denominator>{_DECIMAL})(?![\d]|\ ?/\ ?\d)"
    rf"|(?P<dotted>{_DOTTED})"
    rf"|(?P<digits>(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE](?P<exponent>{_SIGN}?\d+)|{_POWER})?"
    r")"
    r"(?P<percent>\s?(?:\\?[%％](?!\s?\d)|per\ ?cent\b))?"
)
"""Regular expression of a number; its groups are numbered from 1 inside."""
_SPACED_SIGN = regex.compile(rf"^({_SIGN}) (?=\S)")
_WHOLE_NUMBER = regex.compile(rf"[$€£¥]?{NUMBER}\.?")


@dataclass(frozen=True)
class Number:
    """A finite number, and whether it was written in percent."""

    value: float
    is_percent: bool = False

    def readings(self, other: Number) -> tuple[float, ...]:
        """Return the values to compare with `other`: 50 % is 0.5, and also 50 if only one of the two is in percent."""
        return (self.value, self.value * 100) if self.is_percent and not other.is_percent else (self.value,)


def read_number(value: Any) -> Number | None:
    """Return the finite number that a value is or spells, else None."""
    if isinstance(value, bool):
        return None
    try:
        number = _spelled(value) if isinstance(value, str) else Number(float(value))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None
    return number if number is not None and math.isfinite(number.value) else None


def number_of(value: Any) -> float | None:
    """Return the value of `read_number`."""
    number = read_number(value)
    return None if number is None else number.value


def _spelled(text: str) -> Number | None:
    text = _SPACED_SIGN.sub(r"\1", text.strip())
    match = _WHOLE_NUMBER.fullmatch(text) or _WHOLE_NUMBER.fullmatch(text.strip("$*").strip())
    if match is None:
        return None
    value = _magnitude(match)
    if match["sign"] and match["sign"] in _MINUS:
        value = -value
    is_percent = match["percent"] is not None
    return Number(value / 100 if is_percent else value, is_percent)


def _magnitude(match: regex.Match[str]) -> float:
    if match["upper"]:
        return _plain_float(match["upper"]) / float(match["lower"])
    if match["power_alone"] or match["raised_alone"]:
        return 10.0 ** _exponent(match["power_alone"] or match["raised_alone"])
    if match["dotted"]:
        return float(match["dotted"].replace(".", "").replace(",", "."))
    if match["vulgar"]:
        return float(match["whole"] or 0) + unicodedata.numeric(match["vulgar"])
    if match["numerator"]:
        return float(match["units"] or 0) + float(match["numerator"]) / float(match["denominator"])
    digits = regex.sub(_GROUP, "", match["digits"])
    return float(f"{digits}e{_exponent(match['exponent'] or match['power'] or match['raised'] or '0')}")


def _exponent(text: str) -> int:
    return int(_plain_float(text.translate(_SUPERSCRIPTS)))


def _plain_float(text: str) -> float:
    return float(regex.sub(f"[{_MINUS}]", "-", text).replace("＋", "+"))
