"""Chat templates of strangers: what they may do comes out as Jinja has it, what would hang or fill the memory is refused."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertstream.engine import embedded_model
from expertstream.errors import BudgetError, RequestError
from expertstream.text import template
from expertstream.text.template import render_template

from .test_fork import in_a_fork

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


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "CPU_SECONDS", 1)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("hurried")
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
        # What none of the bounds inside the process knows of; its limits on memory and time hold.
        "{% set ns = namespace(x=[]) %}{% for i in range(100) %}{% set ns.x = ns.x + ['x' * (60000000 + i)] %}{% endfor %}",
        "{{ (3 ** 20000000) % (3 ** 10000000) > 1 }}", "{{ (7 ** 20000000) * (5 ** 20000000) // (3 ** 20000000) > 1 }}",
        "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{{ messages.append(1) }}",
    ],
)  # fmt: skip
def test_what_would_hang_or_fill_the_memory_is_refused(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template failed: "):
        render_template(source, VALUES)
    assert render_template("{{ messages | length }}", VALUES) == "2"


BOMB = (
    "{% set ns = namespace(x=[]) %}{% for i in range(100) %}{% set ns.x = ns.x + ['x' * (60000000 + i)] %}{% endfor %}"
)


def test_a_template_that_needs_too_much_memory_or_time_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="more than 512 MiB of memory"):
        render_template(BOMB, {})
    monkeypatch.setattr(template, "CPU_SECONDS", 1)
    with pytest.raises(RequestError, match="more than 1 seconds of processor time"):
        render_template("{{ (3 ** 20000000) % (3 ** 10000000) > 1 }}", {})


def test_bombs_do_not_keep_others_waiting() -> None:
    failed: list[str] = []

    def explode() -> None:
        with pytest.raises(RequestError) as caught:
            render_template(BOMB, {})
        failed.append(str(caught.value))

    bombs = [threading.Thread(target=explode) for _ in range(3)]
    for bomb in bombs:
        bomb.start()
    for i in range(20):
        assert render_template("{{ i }}", {"i": i}) == str(i)
    for bomb in bombs:
        bomb.join()
    assert len(failed) == 3


def test_one_process_renders_one_template_after_another_and_is_replaced_when_it_was_ended() -> None:
    render_template("", {})
    (first, *_) = template._idle.processes[::-1]
    render_template("{{ a }}", {"a": 1})
    assert template._idle.processes[-1] is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert render_template("{{ a }}", {"a": 2}) == "2"
    assert template._idle.processes[-1] is not first


def test_a_process_that_dies_under_a_template_is_told_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "WALL_SECONDS", 0.0)
    with pytest.raises(RequestError, match="its process was killed"):
        render_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {})
    monkeypatch.undo()
    assert render_template("{{ a }}", {"a": 2}) == "2"


def test_an_interrupt_ends_the_process_that_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    render_template("", {})
    asked = template._idle.processes[-1]

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(template, "read_message", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render_template("{{ a }}", {"a": 1})
    monkeypatch.undo()
    assert asked.returncode is not None
    assert render_template("{{ a }}", {"a": 3}) == "3"


def test_a_fork_has_a_process_of_its_own() -> None:
    render_template("", {})
    mine = template._idle.processes[-1].pid

    def child() -> None:
        assert render_template("{{ a }}", {"a": 4}) == "4" and template._idle.processes[-1].pid != mine
        template._idle.close()

    assert in_a_fork(child) == 0
    assert render_template("{{ a }}", {"a": 5}) == "5" and template._idle.processes[-1].pid == mine


def test_where_no_process_can_be_started_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    template._idle.close()
    monkeypatch.setattr(template.subprocess, "Popen", refuse)
    with pytest.raises(BudgetError, match="cannot be started: Resource temporarily unavailable"):
        render_template("", {})


def test_values_that_are_no_json_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (object(), deep, {1, 2}):
        with pytest.raises(RequestError, match="must be JSON values"):
            render_template("{{ a }}", {"a": value})


def test_text_of_any_kind_comes_through() -> None:
    text = "\x00\r\n\u2028 \ud800 \U0001f600 é" + "x" * 5_000_000
    assert render_template("{{ a }}", {"a": text}) == text
