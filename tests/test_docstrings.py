"""Every public name says what it does and what it takes, and the packages speak through `logging`, not `print`."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "comm", "compress", "optim")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = [".".join(("onebit", *path.with_suffix("").parts)).removesuffix(".__init__") for path in FILES]
SENTENCE_ENDS = (".", "?", "!")


def is_public(name: str) -> bool:
    return not name.startswith("_")


def public_classes(module: ModuleType) -> Iterator[tuple[str, type]]:
    """The public classes that this module itself defines."""
    for name, value in vars(module).items():
        if is_public(name) and inspect.isclass(value) and value.__module__ == module.__name__:
            yield name, value


def public_functions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public functions that this module itself defines, those compiled by Numba included."""
    for name, value in vars(module).items():
        function = getattr(value, "py_func", value)
        if is_public(name) and inspect.isfunction(function):
            function = inspect.unwrap(function)
            if function.__module__ == module.__name__:
                yield name, function


def public_members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class itself defines or overrides."""
    fields = getattr(cls, "__dataclass_fields__", {})  # one whose default is a function is no method
    for name, value in vars(cls).items():
        kind = isinstance(value, (property, cached_property, classmethod, staticmethod)) or inspect.isroutine(value)
        if is_public(name) and name not in fields and kind:
            yield name, getattr(cls, name)


def has_docstring(value: Any) -> bool:
    """Whether somebody wrote one: a method may inherit it; a dataclass is given its signature where nobody did."""
    if inspect.isclass(value):
        doc = vars(value).get("__doc__") or ""
        return bool(doc) and not doc.startswith(f"{value.__name__}(")
    return bool(inspect.getdoc(value))


def plain_functions(member: Any) -> list[Callable[..., Any]]:
    """The functions behind a method or a property."""
    if isinstance(member, property):
        return [accessor for accessor in (member.fget, member.fset) if accessor is not None]
    if isinstance(member, cached_property):
        return [member.func]
    return [inspect.unwrap(getattr(member, "__func__", member))]


def unannotated(function: Callable[..., Any]) -> list[str]:
    """The parameters of a function that have no annotation, and ``return`` if its result has none."""
    if not inspect.isfunction(function):
        return []
    parameters = list(inspect.signature(function).parameters.values())
    bare = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")]
    return bare + ["return"] * ("return" not in function.__annotations__)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_opens_with_one_sentence_on_one_line(name: str) -> None:
    first = (inspect.getdoc(importlib.import_module(name)) or "").partition("\n")[0]
    assert first.endswith(SENTENCE_ENDS), f"{name} opens with {first!r}"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    classes = dict(public_classes(module))
    named = [*classes.items(), *public_functions(module)]
    named += [(f"{owner}.{member}", value) for owner, cls in classes.items() for member, value in public_members(cls)]
    missing = [f"{name}.{label}" for label, value in named if not has_docstring(value)]
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_is_annotated(name: str) -> None:
    module = importlib.import_module(name)
    functions = list(public_functions(module))
    for owner, cls in public_classes(module):
        for member, value in [*public_members(cls), ("__init__", cls.__init__)]:
            functions += [
                (f"{owner}.{member}", f) for f in plain_functions(value) if getattr(f, "__module__", "") == name
            ]
    bare = [f"{name}.{label}: {found}" for label, function in functions if (found := unannotated(function))]
    assert not bare


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "benchmarks"], ids=str)
def test_a_library_module_does_not_print(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    printed = [f"{path}:{name.lineno}" for name in called if isinstance(name, ast.Name) and name.id == "print"]
    assert not printed
