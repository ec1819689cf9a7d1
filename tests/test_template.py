"""Chat templates of strangers: what they may do comes out as Jinja has it, what would hang or fill the memory is refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertstream.engine import embedded_model
from expertstream.template import render_template

VALUES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "n": 3}],
    "tools": [{"a": 1}],
    "add_generation_prompt": True,
}

ORDINARY = [
    "{% for m in messages %}{{ loop.index0 ~ m.role + ': ' + m.content }}\n{% endfor %}",
    "{% macro show(m, k=2) %}<{{ m.content * k }}>{% endmacro %}{% for m in messages if m.role == 'user' %}{{ show(m) }}{% endfor %}",
    "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x ~ m.role %}{% endfor %}{{ ns.x | upper }}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content | replace('H', 'J') | center(9) }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ '%s-%d' % ('a', 3) }}{{ '{}'.format(2) }}{{ 2 ** 5 }}{{ [1] + [2] }}",
    "{% set x = 'a' ~ ('b' ~ messages[0].content) %}{{ x.replace('b', 'cc').strip().split('c') }}{{ x | indent(2) }}",
    "{% macro wrap() %}[{{ caller('z') }}]{% endmacro %}{% call(y) wrap() %}{{ y }}{% endcall %}{{ messages | length }}",
    "{%- for m in messages recursive %}{{ m.role }}{% else %}none{% endfor %}{{ 'x' if add_generation_prompt else 'y' }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ORDINARY)
def test_what_templates_do_is_what_jinja_does(source: str) -> None:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    assert render_template(source, VALUES) == environment.from_string(source).render(**VALUES)


def test_the_embedded_template_is_unchanged_by_the_bounds() -> None:
    source = (embedded_model() / "chat_template.jinja").read_text()
    text = render_template(source, {**VALUES, "enable_thinking": False})
    assert text.startswith("<|im_start|>") and "Hello" in text


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10000000000 }}",
        "{{ [0] * 10000000000 }}",
        "{{ 2 ** 10000000000 }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(9) %}{% set ns.x = ns.x | replace('x', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(9) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
        "{{ [] | slice(1000000000) | list }}", "{{ [1] | batch(1000000000, 0) | list }}", "{{ [1] | batch(linecount=2 ** 40, fill_with=0) | list }}",
        "{{ ('a' * 1000000) | wordwrap(1) }}", "{{ lipsum(n=10000000) }}",
        "{{ 'x'.center(10000000000) }}", "{{ 'x' | center(10000000000) }}", "{{ 'x'.zfill(10000000000) }}",
        "{{ '%99999999999d' % 3 }}", "{{ '{:>99999999999}'.format('x') }}", "{{ messages | tojson(indent=100000000) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ '' ~ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ '%s' % ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | upper }}",
        "{% for i in range(2000) %}{% set x = range(99999) | map('string') | join | length %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{{ messages.append(1) }}",
    ],
)  # fmt: skip
def test_what_would_hang_or_fill_the_memory_is_refused(source: str) -> None:
    begin = time.monotonic()
    with pytest.raises((TemplateError, RecursionError, TypeError, MemoryError)):
        render_template(source, VALUES)
    assert time.monotonic() - begin < 40  # not a measure of speed: without bounds it would be days
