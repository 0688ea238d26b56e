"""Hostile chat templates (rows C01 to C07 and C10 of the bad inputs): one typed error, in bounded time and memory."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from nomoat.errors import TemplateError
from nomoat.text import sandbox
from nomoat.text.template import ChatTemplate

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]

ESCAPES = {  # C01 to C03
    "class": "{{ ''.__class__.__mro__ }}",
    "subscript": "{{ ''['__class__'] }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "cycler": "{{ cycler.__init__ }}",
    "self": "{{ self._TemplateReference__context }}",
    "undefined": "{{ nothing.__init__.__globals__ }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "loop": "{% for x in [1] %}{{ loop._iterable }}{% endfor %}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "range": "{{ range.__globals__ }}",
    "our functions": "{{ raise_exception.__globals__ }}{{ strftime_now.__globals__ }}",
    "message": "{{ messages.__class__ }}",
    "number": "{{ (1).__class__ }}",
    "attr filter": "{{ ''|attr('format') }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "format by subscript": "{{ ''['format'] }}",
    "format_map": "{{ '{x}'.format_map({'x': 1}) }}",
    "stored format": "{{ [messages]|map('{0.__class__}'.format)|list }}",
    "map attribute": "{{ messages|map(attribute='__class__')|list }}",
    "sort attribute": "{{ messages|sort(attribute='__class__') }}",
    "percent": "{{ '%s' % messages }}",
    "encode": "{{ 'x'.encode() }}",
    "mutate list": "{{ messages.append(1) }}",
    "mutate dict": "{{ messages[0].update(a=1) }}",
    "pop": "{{ messages.pop() }}",
    "name of the template": "{% set x = self._TemplateReference__context.name %}",
}

HUNGRY = {  # C04
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "nested loops": "{% for i in range(25000) %}{% for j in range(25000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in range(100) recursive %}{{ loop(range(1000)) if loop.depth < 9 }}{% endfor %}",
    "endless recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "repeat text": "{{ 'x' * 10000000000 }}",
    "repeat list": "{{ ([1] * 10000000000)|length }}",
    "power": "{{ 10**100000000 }}",
    "tower": "{{ 9**9**9 }}",
    "squares": "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "indent": "{{ 'x\ny'|indent(10000000000) }}",
    "indent by text": "{{ ('\n' * 100000)|indent('x' * 1000) }}",
    "tojson indent": "{{ [1]|tojson(indent=1000000000) }}",
    "double by +": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "double by ~": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "double list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nest lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nest dicts": "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}",
    "nest literals": "{% set ns = namespace(x={}) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}",
    "double block": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "replace": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aaaa') %}{% endfor %}",
    "replace filter": "{% set x = 'a' * 1000000 %}{{ x|replace('', x) }}",
    "join": "{{ ('a' * 1000000).join('b' * 1000000) }}",
    "join filter": "{{ range(100000)|join('a' * 1000) }}",
    "center": "{{ 'x'.center(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "percent width": "{{ '%999999999d' % 1 }}",
    "fixed text": "{% for i in range(100000) %}" + "y" * 10000 + "{% endfor %}",
    "captured fixed text": "{% set x %}{% for i in range(100000) %}" + "y" * 10000 + "{% endfor %}{% endset %}",
    "fixed text in a macro": "{% macro f() %}" + "y" * 10000 + "{% endmacro %}{% set x %}{% for i in range(100000) %}"
    "{{ f() }}{% endfor %}{% endset %}",
    "search": "{% set x = 'a' * 1000000 %}{% for i in range(100000) %}{% if 'b' * 500000 in x %}{% endif %}{% endfor %}",
    "sort": "{% for i in range(100000) %}{% set x = range(100000)|sort %}{% endfor %}",
    "split": "{% for i in range(100000) %}{% set x = ('a ' * 400000).split() %}{% endfor %}",
    "date format": "{{ strftime_now('%A' * 1000000) }}",
}

BROKEN = {  # C05 and C07: at load
    "include": "{% include 'x' %}",
    "include in a dead branch": "{% if false %}{% include 'x' %}{% endif %}",
    "import": "{% import 'x' as y %}",
    "from": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "unknown filter": "{{ 'x'|nope }}",
    "unknown test": "{{ 'x' is nope }}",
    "unknown tag": "{% nope %}",
    "debug": "{% debug %}",
    "cut off": "{{ ",
    "open block": "{% for x in y %}",
    "open generation": "{% generation %}",
    "long": "x" * 10_000_000,
    "nested ifs": "{% if 1 %}" * 20_000 + "{% endif %}" * 6_000,
    "nested loops": "{% for x in [1] %}" * 30 + "{% endfor %}" * 30,
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "sums": "{{ " + "+".join(["1"] * 20_000) + " }}",
    "attributes": "{{ messages" + ".a" * 20_000 + " }}",
    "filters": "{{ 'a'" + "|upper" * 10_000 + " }}",
    "NUL": "\0{{ 1 }}",
}


def render(source: str) -> str:
    return ChatTemplate(source).render(MESSAGES)


@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_out(name: str) -> None:
    with pytest.raises(TemplateError, match=r"SecurityError|UndefinedError|TemplateAssertionError|SyntaxError"):
        render(ESCAPES[name])


@pytest.mark.parametrize("name", HUNGRY)
def test_work_is_bounded(name: str) -> None:
    """At most the time limit (and what one step may take), and 64 MiB."""
    tracemalloc.start()
    begin = time.thread_time()
    try:
        with pytest.raises(TemplateError):
            ChatTemplate(HUNGRY[name], seconds=0.2).render(MESSAGES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert time.thread_time() - begin < 3  # tracing memory makes each step several times slower


@pytest.mark.parametrize("name", BROKEN)
def test_broken_templates_fail_at_load(name: str) -> None:
    begin = time.thread_time()
    with pytest.raises(TemplateError):
        ChatTemplate(BROKEN[name])
    assert time.thread_time() - begin < 5


def test_steps_are_limited_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 1000)
    with pytest.raises(TemplateError, match="too many steps") as caught:
        render("{% for i in range(5000) %}{% endfor %}")
    assert caught.value.code == "E_BUDGET"


def test_the_budget_is_per_rendering() -> None:
    template = ChatTemplate("{% for i in range(20000) %}{{ 'xxxxxxxxxx' }}{% endfor %}", seconds=60)
    assert len({len(template.render(MESSAGES)) for _ in range(3)}) == 1


def test_what_a_template_raises_reaches_the_user_escaped() -> None:  # C06
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('\x1b[31mno system role\n') }}")
    assert str(caught.value) == "\\x1b[31mno system role\\x0a"
    assert caught.value.code == "E_RAISED"
    assert caught.value.exit_code == 2


def test_the_clock_stands_still() -> None:  # C10
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "26 Jul 2024 00:00"
    with pytest.raises(TemplateError):
        render("{{ ['a']|random }}")


def test_ordinary_templates_are_not_touched_by_the_limits() -> None:
    """Everything that the rewriting of the syntax tree handles, with jinja2's own result."""
    source = (
        "{% macro m(a, b=[1, 2]) %}<{{ a }}{{ b|length }}>{% endmacro %}"
        "{% set ns = namespace(n=0, seen=[]) %}"
        "{% for k, v in {'a': 1, 'b': (2, 3)}.items() %}{{ loop.index }}{{ k ~ '=' ~ v }}{{ ',' if not loop.last }}"
        "{% set ns.seen = ns.seen + [k] %}{% endfor %};{{ ns.seen|join('+') }};"
        "{{ m('x') }}{{ m('y', b=[]) }};{{ 2**5 }};{{ 7 % 4 }};{{ 'ab' * 2 }};{{ [1, 2][::-1] }};{{ messages[1:][0].content }};"
        "{% for m in messages if m.role == 'user' %}{{ m['content']|upper }}{% else %}none{% endfor %};"
        "{% set x %}in {{ 1 + 1 }}{% endset %}{{ x }};{{ range(3)|map('string')|list }};"
        "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %};"
        "{% filter upper %}loud{% endfilter %};{% call(z) m2() %}{{ z }}{% endcall %}"
    )
    source = "{% macro m2() %}[{{ caller('c') }}]{% endmacro %}" + source
    import jinja2
    from jinja2.ext import loopcontrols

    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    expected = plain.from_string(source).render(messages=MESSAGES)
    assert render(source) == expected
    assert "1a=1,2b=(2, 3);a+b;<x2><y0>;32;3;abab;[2, 1];Hi;HI;in 2;['0', '1', '2'];02;LOUD;[c]" in expected


def test_json_is_written_as_hugging_face_writes_it() -> None:
    assert render("{{ {'b': '<é&\\'>', 'a': [1, none, true]}|tojson }}") == '{"b": "<é&\'>", "a": [1, null, true]}'
    assert render("{{ {'a': 1}|tojson(indent=2) }}") == '{\n  "a": 1\n}'
