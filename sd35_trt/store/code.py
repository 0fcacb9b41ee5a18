"""The code that a stage's result depends on: modules, and all that they import of this package."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

_PACKAGE = __name__.partition(".")[0]

# How results are kept is of no effect on them.
_STORE = __name__.rpartition(".")[0]


@functools.cache
def code_digest(*names: str) -> str:
    """SHA-256 over the sources of modules and, in turn, of what they import of this package.

    Imports inside functions count, and the packages that a module is in; imports for type checkers
    alone do not, nor does what keeps results. A module that is imported by a name made at run time
    has to be given.

    Args:
        names: dotted names; nothing is imported.

    Raises:
        ModuleNotFoundError: names the module that there is not.
    """
    sources: dict[str, bytes] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        path = _source(name)
        if path is None:
            raise ModuleNotFoundError(f"no module named {name!r}", name=name)
        sources[name] = path.read_bytes()
        waiting += _imports(name, path, sources[name])
        waiting += filter(_source, itertools.accumulate(name.split(".")[:-1], "{}.{}".format))
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name} {len(source)}\0".encode() + source)
    return digest.hexdigest()


def _source(name: str) -> Path | None:
    """The file of a module; None where there is no such module, or none with code."""
    spec = _spec(name)
    return (
        None if spec is None or not spec.has_location or spec.origin is None else Path(spec.origin)
    )


@functools.cache
def _spec(name: str) -> ModuleSpec | None:
    """As :func:`importlib.util.find_spec`, which imports the packages that a module is in."""
    parent, _, _ = name.rpartition(".")
    path = None
    if parent:
        package = _spec(parent)
        path = None if package is None else package.submodule_search_locations
        if path is None:
            return None
    specs = (finder.find_spec(name, path, None) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


def _imports(name: str, path: Path, source: bytes) -> Iterator[str]:
    """The modules of this package that a module imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _nodes(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package)
            candidates = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for candidate in candidates:
            ours = _is_in(_PACKAGE, candidate) and not _is_in(_STORE, candidate)
            # What is imported from a module may be a submodule, or a name in it.
            if ours and _source(candidate) is not None:
                yield candidate


def _is_in(package: str, name: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """As :func:`ast.walk`, but for what stands under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node)
