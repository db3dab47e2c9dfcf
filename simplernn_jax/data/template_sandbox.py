"""A Jinja sandbox in which a template of somebody else can use neither much time nor much memory.

Jinja's own sandbox keeps a template from Python's internals, but not from ``'a' * 10**10`` or two
nested loops. Here every loop, call, filter, product, concatenation and output is counted before it
happens, in characters of its result and in seconds of this thread.
"""

import contextlib
import contextvars
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes, visitor
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 1.0
"""CPU time of one rendering."""
MIN_CHARACTERS = 10**7
MAX_EXPANSION = 1000
"""A rendering may produce this many characters for each one of its messages, intermediate results
included, or `MIN_CHARACTERS` if that is more."""
MAX_BITS = 4096
"""Limit of an integer."""
ITEM_SIZE = 10
"""Characters that an item of a list counts as."""

_CALLS_PER_CHECK = 32
"""The clock is read by a system call, which takes longer than most operations of a template."""
_FREE_FILTERS = ("length", "count", "first", "last")
_REMOVED_FILTERS = ("format", "urlize", "striptags")
_REFUSED_METHODS = ("format", "format_map", "expandtabs", "translate")


class LimitError(Exception):
    """A template uses too much time or memory."""


class _Budget:
    def __init__(self, characters: int) -> None:
        self.characters = characters
        self._deadline = time.thread_time() + MAX_SECONDS
        self._calls = 0

    def spend(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise LimitError("it renders too much text")
        self._calls += 1
        if self._calls % _CALLS_PER_CHECK == 0 and time.thread_time() > self._deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:g} s")


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")
"""Missing while a template is compiled: nothing is then evaluated in advance."""


def compiled(source: str) -> jinja2.Template:
    """Compile a template, to be rendered inside of `limits`; fails in any way if it is none."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    tree = _Counting().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.from_string(tree)


@contextlib.contextmanager
def limits(characters: int) -> Iterator[None]:
    """Bound the rendering of messages of that many characters; raises `LimitError` beyond."""
    token = _budget.set(_Budget(max(MIN_CHARACTERS, MAX_EXPANSION * characters)))
    try:
        yield
    finally:
        _budget.reset(token)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_output, **options)
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name, function in self.filters.items():
            if name not in _FREE_FILTERS:
                self.filters[name] = _counted_filter(function)
        self.filters |= {"_items": _items, "_value": _value}

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if (name := getattr(function, "__name__", None)) in _REFUSED_METHODS:
            raise LimitError(f"it calls {name}(); use ~")
        _spend_on_call(getattr(function, "__self__", None), args, kwargs)
        if isinstance(function, LoopContext):  # a recursive loop
            args = (_items(args[0]), *args[1:])
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1)
            if bits + right.bit_length() > MAX_BITS:
                raise LimitError(f"it computes an integer of more than {MAX_BITS:,} bits")
            budget.spend(0)
        elif operator == "*":
            budget.spend(_size(left) * _size(right))
        elif operator == "%" and isinstance(left, str):
            raise LimitError("it formats by %; use ~")
        else:
            budget.spend(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


class _Counting(visitor.NodeTransformer):
    """Pass what is iterated, concatenated or collected through `_items` or `_value`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("_items", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_through("_value", part) for part in node.nodes]
        return node

    def _visit_collection(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _through("_value", node)

    visit_List = visit_Tuple = visit_Dict = _visit_collection


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _items(iterable: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for item in iterable:
        budget.spend(1)
        yield item


def _value(value: Any) -> Any:
    size = len(value) if type(value) is str else _size(value, of_number=20)
    _budget.get().spend(size)
    return value


@jinja2.pass_context  # otherwise it would be called for constants while compiling
def _output(context: Any, value: Any) -> Any:
    return _value(value)


def _counted_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        has_context = hasattr(function, "jinja_pass_arg")
        _spend_on_call(args[has_context], args[1 + has_context :], kwargs)
        return function(*args, **kwargs)

    return counted


def _spend_on_call(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Spend a bound on the result of padding, replacing, joining and the like."""
    value_size = _size(value, of_number=20)
    _budget.get().spend((1 + value_size) * (1 + _size([*args, *kwargs.values()])))


def _size(value: Any, of_number: int | None = None) -> int:
    """Count the characters of a value, and stop where it is beyond the budget.

    A number, which may be that of copies or of spaces, counts as itself or as `of_number`.
    """
    limit, size, rest = _budget.get().characters, 0, [value]
    while rest and size <= limit:
        value = rest.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, (list, tuple, set, frozenset)):
            size += ITEM_SIZE * len(value)
            rest.extend(value)
        elif isinstance(value, dict):
            size += ITEM_SIZE * len(value)
            rest.extend(value.keys())
            rest.extend(value.values())
        elif isinstance(value, int) and not isinstance(value, bool):
            size += abs(value) if of_number is None else of_number
        else:
            size += 1
    return size
