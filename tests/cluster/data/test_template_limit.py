"""Templates that count their passes write the same text; those that hardly end are stopped."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.data.chat_template import render
from cluster.data.template_limit import COUNTER, counted, counter
from cluster.errors import InputError
from tests.support.chat import make_tokenizer

MESSAGES = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
TEMPLATES = (
    "{% for m in messages %}{{ m.content }}{% endfor %}\n\n",
    "  {%- for m in messages -%}  \n x{{ m.role }}\n  {%- endfor -%}\n end\n",
    "  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\n\n",
    "{%+ for m in messages +%}\n{{ loop.index }}{{ loop.last }}{% if loop.first %}"
    "{% continue %}{% endif %}!{% endfor %}",
    "{% macro say(x) %} [{{ x }}] {%- endmacro %}"
    "{% for m in messages if m.role == 'user' %}{{ say(m.content) }}{% endfor %}",
    "{% raw %}{% for x in y %}{% endraw %}{# {% for %} #}{{ '{% for x in y %}' }}",
    "{% for m in [[1, [2]], [3]] recursive %}"
    "{% if m is iterable %}({{ loop(m) }}){% else %}{{ m }}{% endif %}{% endfor %}",
    "{% set n = namespace(x=0) %}{% for m in messages %}\r\n"
    "{% set n.x = n.x + 1 %}{% else %}none{% endfor %}{{ n.x }}\r\n",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
)


def text(template: str, **values: Any) -> str:
    rendered = make_tokenizer().apply_chat_template(MESSAGES, chat_template=template, tokenize=False, **values)
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_counted_template_writes_the_same_text(template: str) -> None:
    assert text(counted(template), **{COUNTER: counter("here")}) == text(template)


ENDLESS = (
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}",
    "{% for a in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_hardly_ends_is_stopped(template: str) -> None:
    with pytest.raises(InputError, match=r"the chat template does not end \(more than 1,000,000 passes"):
        render(make_tokenizer(template=template), MESSAGES[:1], "row 1", is_prompt=True)


def test_a_template_with_an_error_in_it_is_refused() -> None:
    with pytest.raises(InputError, match="the chat template refuses it: "):
        render(make_tokenizer(template="{% for m in %}"), MESSAGES, "row 1", is_prompt=True)
