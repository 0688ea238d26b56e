"""A jinja2 environment for templates that come out of model files: no way out, and a bounded amount of work.

jinja2's immutable sandbox keeps a template away from Python's insides. It does not bound work: `{{ 'x' * 10**10 }}` or two nested
loops stop the process. Four rules do, without threads or signals, so that they hold in any host program:

1. Every call, attribute access, loop round and macro entry is a step; steps and wall time are limited.
2. No value outgrows the limit: literals, calls, filters and operators are checked when they make a string or a container. So
   every single operation in between, which no step interrupts, is short.
3. Output, in captured blocks too, is counted.
4. Only filters and methods that rules 1-3 cover exist. `include`, `import` and `extends` do not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sized
from contextvars import ContextVar
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateAssertionError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from nomoat.errors import TemplateError

MAX_SOURCE = 1 << 18  # characters of a template; the largest known one has 17 thousand
MAX_STEPS = 1_000_000
MAX_SIZE = 1 << 20  # characters of output, and characters + elements of any value
MAX_RANGE = 100_000
MAX_INT_BITS = 256
MAX_WIDTH = 1_000  # indentation and the like

_STRING_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper join lower"
    " lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip"
    " swapcase title upper".split()
)
_METHODS: dict[type, frozenset[str]] = {
    str: _STRING_METHODS,
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
_FILTERS = (
    "abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower map max"
    " min reject rejectattr replace reverse round safe select selectattr sort string title trim unique upper wordcount"
).split()


class Budget:
    """What one rendering may still spend. `marks` surround what stands in `{% generation %}` blocks; `guard` is never escaped."""

    def __init__(self, *, marks: tuple[str, str] = ("", ""), guard: str = "", seconds: float) -> None:
        self.marks = marks
        self.guard = guard
        self.steps = MAX_STEPS
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.output = 0

    def step(self) -> None:
        """One step. Raises TemplateError E_BUDGET when steps or time are used up."""
        self.steps -= 1
        if self.steps < 0:
            raise _over("takes too many steps")
        if time.monotonic() > self.deadline:
            raise _over(f"takes longer than {self.seconds:g} s")

    def write(self, size: int) -> None:
        """`size` more characters of output, captured or final."""
        self.output += size
        if self.output > 4 * MAX_SIZE:  # text that is captured first and printed later counts more than once
            raise _over(f"writes more than {MAX_SIZE:,} characters")


def _over(what: str) -> TemplateError:
    return TemplateError(f"the chat template {what}; it is broken or hostile", code="E_BUDGET")


_budget: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def spend(budget: Budget) -> Any:
    """Make `budget` the current one; give the result to `restore`."""
    return _budget.set(budget)


def restore(token: Any) -> None:
    """End of a rendering."""
    _budget.reset(token)


def check_size(value: Any) -> Any:
    """`value`, if its characters and elements, counted through all nesting, stay under MAX_SIZE; else TemplateError E_BUDGET."""
    if isinstance(value, str):
        if len(value) > MAX_SIZE:
            raise _over(f"makes a text of {len(value):,} characters (limit {MAX_SIZE:,})")
        return value
    if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
        raise _over("makes a number that is too large")
    if not isinstance(value, (list, tuple, dict, set)):
        return value
    size = 0
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            size += 2 * len(item)
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            size += len(item)
            stack.extend(item)
        if size > MAX_SIZE:
            raise _over(f"makes a value of more than {MAX_SIZE:,} characters and elements")
    return value


class Generation(Extension):
    """`{% generation %}`...`{% endgeneration %}`: what the model says. The marks, if set, surround it in the output."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        parser.environment.has_generation = True  # type: ignore[attr-defined]
        mark = nodes.EnvironmentAttribute
        open_, close = (nodes.Output([nodes.Call(mark(m), [], [], None, None)]) for m in ("open_mark", "close_mark"))
        return nodes.Scope([open_, *body, close]).set_lineno(line)


class Environment(ImmutableSandboxedEnvironment):
    """jinja2 as Hugging Face sets it up for chat templates, with limits. Raises TemplateError from every rule above."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=_write, extensions=[Generation, loopcontrols])
        self.has_generation = False
        plain = {name: self.filters[name] for name in _FILTERS}
        self.filters = {name: _checked_filter(name, call) for name, call in plain.items()}
        self.filters["tojson"] = _tojson
        self.globals = {
            "range": _range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
        }

    # -- compile time --------------------------------------------------------------------------------------------------------

    def _generate(self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False) -> str:
        for node in source.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            kind = type(node).__name__.lower()
            raise TemplateAssertionError(f"`{kind}` reads other files: chat templates must not", node.lineno, name)
        _instrument(source)
        return super()._generate(source, name, filename, defer_init)

    # -- run time ------------------------------------------------------------------------------------------------------------

    def tick(self, size: int) -> None:
        """A loop round or macro begins, or `size` characters of fixed text are about to be printed."""
        _write_size(size)

    def checked(self, value: Any) -> Any:
        """A container literal."""
        return check_size(value)

    def concat_checked(self, *values: Any) -> str:
        """The operator `~`."""
        return str(check_size("".join([str(check_size(value)) for value in check_size(values)])))

    def open_mark(self) -> str:
        budget = _budget.get()
        return budget.marks[0] if budget else ""

    def close_mark(self) -> str:
        budget = _budget.get()
        return budget.marks[1] if budget else ""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template: counted, its growth checked before, its result after."""
        _step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            _check_growth(owner, name, args)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(__obj, Macro) else check_size(result)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _step()
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, (LoopContext, Namespace, Macro, Undefined)) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        if isinstance(getattr(value, "__self__", None), str) and value.__name__ in ("format", "format_map"):
            raise SecurityError("`str.format` is not available to templates")

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"`{attribute}` of {type(obj).__name__} is not available to templates")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `%`, `**`, refused before they would build something large."""
        _step()
        if operator == "%" and isinstance(left, (str, bytes)):
            raise SecurityError("`%` formatting is not available to templates")
        if operator == "**" and not (isinstance(right, int) and abs(right) <= MAX_INT_BITS):
            raise _over("raises to a power that is too large")
        if operator == "*":
            for a, b in ((left, right), (right, left)):
                if isinstance(b, int) and isinstance(a, (str, list, tuple)) and len(a) * b > MAX_SIZE:
                    raise _over(f"makes a value of more than {MAX_SIZE:,} characters and elements")
        return check_size(super().call_binop(context, operator, left, right))


def _instrument(node: nodes.Node) -> None:
    """Insert the run-time checks into a syntax tree (changed in place)."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [new for old in value for new in _instrumented(old)])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _instrumented(value)[-1])
    if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock)):
        node.body.insert(0, _tick(0, node.lineno))


def _instrumented(node: Any) -> list[Any]:
    """What takes the place of `node`: `~` and container literals become calls that check what they make; text is counted."""
    if not isinstance(node, nodes.Node):
        return [node]
    _instrument(node)
    line = node.lineno
    if isinstance(node, nodes.Concat):
        return [nodes.Call(nodes.EnvironmentAttribute("concat_checked"), node.nodes, [], None, None, lineno=line)]
    if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return [nodes.Call(nodes.EnvironmentAttribute("checked"), [node], [], None, None, lineno=line)]
    if isinstance(node, nodes.Output):
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [_tick(size, line), node] if size else [node]
    return [node]


def _tick(size: int, line: int) -> nodes.Node:
    call = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(size)], [], None, None, lineno=line)
    return nodes.ExprStmt(call, lineno=line)


def _step() -> None:
    budget = _budget.get()
    if budget is not None:
        budget.step()


def _write_size(size: int) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.write(size)


def _write(value: Any) -> Any:
    """Everything that a template prints passes here."""
    if isinstance(check_size(value), str):
        _write_size(len(value))
        return value
    text = str(value)
    _write_size(len(text))
    return text


def _check_growth(text: str, name: str, args: tuple[Any, ...]) -> None:
    """Refuse `replace` and `join` whose result would be too large, before it exists."""
    if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        count = text.count(args[0])
        if len(text) + count * (len(args[1]) - len(args[0])) > MAX_SIZE:
            raise _over(f"makes a text of more than {MAX_SIZE:,} characters")
    if name == "join" and args and isinstance(args[0], Sized):
        check_size(args[0])
        if len(text) * len(args[0]) > MAX_SIZE:
            raise _over(f"makes a text of more than {MAX_SIZE:,} characters")


def _checked_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with its arguments and its result checked."""
    passes_first = getattr(call, "jinja_pass_arg", None) is not None

    def checked(*args: Any, **kwargs: Any) -> Any:
        _step()
        value, *options = args[1:] if passes_first else args
        for option in [*options, *kwargs.values()]:
            if isinstance(option, int) and name in ("indent", "round") and abs(option) > MAX_WIDTH:
                raise _over(f"gives the filter `{name}` a number over {MAX_WIDTH:,}")
            check_size(option)
        value = _materialized(value)
        if name == "replace" and len(options) >= 2:
            _check_growth(str(value), "replace", (str(options[0]), str(options[1])))
        elif name == "join":
            _check_growth(str(options[0] if options else kwargs.get("d", "")), "join", (value,))
        elif name == "indent":
            width = options[0] if options else kwargs.get("width", 4)
            lines = str(value).count("\n") + 1
            if lines * (len(width) if isinstance(width, str) else int(width)) > MAX_SIZE:
                raise _over(f"makes a text of more than {MAX_SIZE:,} characters")
        result = call(*args[:1], value, *options, **kwargs) if passes_first else call(value, *options, **kwargs)
        # A lazy result stays lazy for the template (an empty one is true in a condition) but is already computed.
        return iter(_materialized(result)) if isinstance(result, Iterator) else check_size(result)

    checked.__name__ = name
    if passes_first:
        checked.jinja_pass_arg = call.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


def _materialized(value: Any) -> Any:
    """Lazy sequences (`map`, `select`, `items`) as lists of bounded length, so that their size can be checked."""
    if not isinstance(value, Iterator):
        return check_size(value)
    items = []
    for item in value:
        _step()
        items.append(item)
        if len(items) > MAX_RANGE:
            raise _over(f"makes a list of more than {MAX_RANGE:,} elements")
    return check_size(items)


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise _over(f"asks for range of {len(numbers):,} numbers (limit {MAX_RANGE:,})")
    return numbers


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message)[:2000], code="E_RAISED")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face writes it in templates: not escaped for HTML."""
    _step()
    value = _materialized(value)
    if indent is not None and (not isinstance(indent, int) or not 0 <= indent <= 16):
        raise _over("gives `tojson` an indentation that is not a number from 0 to 16")
    if separators is not None and sum(map(len, separators)) > 16:
        raise _over("gives `tojson` separators of more than 16 characters")
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget = _budget.get()
    if ensure_ascii and budget is not None and budget.guard:
        text = text.replace(json.dumps(budget.guard)[1:-1], budget.guard)
    return str(check_size(text))
