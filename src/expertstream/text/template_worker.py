"""The process that renders chat templates: Jinja's sandbox, limits on steps, time and sizes with an error message for each, and below
them the kernel's limits on memory and processor time, which hold whatever a template does.

Started by template.py, with pipes for standard input and output. It does not import NumPy, so that it starts quickly and stays small.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .template import encode, read_message

__all__ = ["render", "serve"]

MEMORY_BYTES = 512 << 20  # of address space, on top of what the process has at its start
KEPT_BYTES = 128 << 20  # a process that has grown by more is not reused
MAX_STEPS = 2_000_000  # loop iterations and macro calls
MAX_CHARACTERS = 64 << 20  # in any intermediate text
MAX_VALUES = 1 << 20  # nested in a value that becomes text
MAX_WRAPPED = 1 << 16  # characters for wordwrap, which is slow
_STEP, _JOIN = "_expertstream_step", "_expertstream_join"
# Filters that read a list without turning it into text.
_LOOKING = frozenset(
    ("length", "count", "first", "last", "list", "map", "select", "selectattr", "reject", "rejectattr", "sort", "unique", "reverse",
     "items", "batch", "slice", "groupby", "sum", "min", "max", "random", "default", "d", "attr", "dictsort")
)  # fmt: skip
_WIDE = re.compile(r"\d{7}")  # a width in a format string


def serve() -> None:
    """Renders templates until standard input ends. Each answer has "text" or "error"; a second message says whether it is the last."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    begin = _resident()
    _limit_process()
    while (message := read_message(requests)) is not None:
        seconds = message["seconds"]
        soft = int(time.process_time()) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (_within(soft, resource.RLIMIT_CPU), _hard(resource.RLIMIT_CPU)))
        try:
            answer = encode({"text": render(message["source"], message["values"], seconds)})
        except MemoryError:
            answer = encode({"error": f"the template needs more than {MEMORY_BYTES >> 20} MiB of memory"})
        except Exception as error:  # untrusted code can raise anything
            answer = encode({"error": str(error) or type(error).__name__})
        last = _resident() - begin > KEPT_BYTES
        answers.write(answer + encode({"last": last}))
        answers.flush()
        if last:
            return
        del message, answer


def _limit_process() -> None:
    """Limits memory and files, and makes this process the first that the kernel kills when memory runs out."""
    with contextlib.suppress(OSError):  # Linux only
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = _within(size + MEMORY_BYTES, resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _hard(limit: int) -> int:
    return resource.getrlimit(limit)[1]


def _within(value: int, limit: int) -> int:
    hard = _hard(limit)
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _resident() -> int:
    """Peak resident bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def render(source: str, values: dict[str, Any], seconds: float) -> str:
    """seconds: of processor time. Raises TemplateError, or any other exception of the template."""
    environment = _Bounded(seconds, trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_shallow)
    tree = environment.parse(source)
    step = nodes.ExprStmt(nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None))
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        node.body.insert(0, step)  # type: ignore[attr-defined]
    for parent in list(tree.find_all(nodes.Node)):
        _join_checked(parent)
    tree.set_environment(environment)
    tree.set_lineno(1)
    template = environment.template_class.from_code(environment, environment.compile(tree), {}, None)
    pieces, size = [], 0
    for piece in template.root_render_func(template.new_context({**environment.globals, **values})):
        size = _small(size + len(piece))
        pieces.append(piece)
    return "".join(pieces)


def _join_checked(parent: nodes.Node) -> None:
    """Replaces `a ~ b` by a call that checks the sizes."""
    for name in parent.fields:
        value = getattr(parent, name)
        if isinstance(value, nodes.Concat):
            setattr(parent, name, nodes.Call(nodes.Name(_JOIN, "load"), value.nodes, [], None, None))
        elif isinstance(value, list):
            value[:] = [
                nodes.Call(nodes.Name(_JOIN, "load"), v.nodes, [], None, None) if isinstance(v, nodes.Concat) else v
                for v in value
            ]


def _small(size: int) -> int:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"the template produces more than {MAX_CHARACTERS >> 20} MiB")
    return size


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _shallow(value: Any) -> Any:
    """The value, if its text is not too long: nested lists that share parts are small in memory, but not as text."""
    if isinstance(value, list | tuple | dict):
        open_, count, size = [value], 0, 0
        while open_:
            for part in (p for v in (open_.pop(),) for p in ([*v.keys(), *v.values()] if isinstance(v, dict) else v)):
                count += 1
                size += len(part) if isinstance(part, str) else 4
                if isinstance(part, list | tuple | dict):
                    open_.append(part)
            if count > MAX_VALUES:
                raise SecurityError(f"the template renders a value with more than {MAX_VALUES:,} parts")
            _small(size)
    return value


def _joined(*parts: Any) -> str:
    texts = [str(_shallow(part)) for part in parts]
    _small(sum(map(len, texts)))
    return "".join(texts)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, **options: Any) -> str:
    options.pop("ensure_ascii", None)
    indent = options.get("indent")
    if indent is not None and _size(indent) + (indent if isinstance(indent, int) else 0) > 100:
        raise SecurityError("tojson: the indent must be at most 100")
    return json.dumps(_shallow(value), ensure_ascii=False, **options)


class _Bounded(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(**options)
        self._steps, self._seconds, self._end = 0, seconds, time.process_time() + seconds
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.now().strftime(_narrow(form)),
            _STEP: self._step,
            _JOIN: _joined,
        }
        del self.globals["lipsum"]  # text of any length, which no chat needs
        self.filters["tojson"] = _tojson
        checks = {
            "replace": _replaced, "center": _padded, "indent": _padded, "format": _formatted,
            "slice": _counted, "batch": _counted, "wordwrap": _wrapped,
        }  # fmt: skip
        for name, function in list(self.filters.items()):
            self.filters[name] = self._checked(name, function, checks.get(name))

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"the template takes more than {MAX_STEPS:,} steps")
        if time.process_time() > self._end:
            raise SecurityError(f"the template takes more than {self._seconds:g} seconds of processor time")

    def _checked(
        self, name: str, function: Callable[..., Any], before: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        """Wraps a filter: counts a step, checks the arguments first and the size of the result."""
        takes_context = hasattr(function, "jinja_pass_arg")

        def filtered(*args: Any, **kwargs: Any) -> Any:
            self._step()
            given = args[1:] if takes_context else args
            if given and name not in _LOOKING:
                _shallow(given[0])
            if before is not None:
                before(*given, *kwargs.values())
            result = function(*args, **kwargs)
            _small(_size(result))
            return result

        if takes_context:
            filtered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return filtered

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, str | bytes | list | tuple) and isinstance(times, int):
                    _small(len(text) * times)
        elif operator == "+":
            _small(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _narrow(left)
            _shallow(right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _small(left.bit_length() * max(right, 0))
        if isinstance(left, int) and isinstance(right, int):
            _small(left.bit_length() + right.bit_length())
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._step()
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str | bytes):
            if name == "replace":
                _replaced(text, *args)
            elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
                _padded(text, *args)
            elif name in ("format", "format_map"):
                _formatted(text, *args)
                _shallow([*args, *kwargs.values()])
            elif name in ("join", "translate"):
                parts = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
                _small(sum(map(_size, parts)) * (1 + len(text)))
        return super().call(context, obj, *args, **kwargs)


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _small(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _padded(text: Any, *widths: Any) -> None:
    for width in widths:
        if isinstance(width, int):
            _small(width * (1 + str(text).count("\n")))


def _counted(_: Any, *numbers: Any) -> None:
    if any(isinstance(number, int) and number > MAX_VALUES for number in numbers):
        raise SecurityError(f"the template makes a list with more than {MAX_VALUES:,} parts")


def _wrapped(text: Any, *_: Any) -> None:
    if len(str(text)) > MAX_WRAPPED:
        raise SecurityError(f"the template wraps a text of more than {MAX_WRAPPED:,} characters")


def _formatted(text: Any, *_: Any) -> None:
    _narrow(str(text))


def _narrow(form: str) -> str:
    if _WIDE.search(form):
        raise SecurityError("a width in a format string is too large")
    return form
