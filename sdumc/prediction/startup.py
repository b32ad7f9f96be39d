"""Start-up of `predict` and `demo`: transformers without the packages that it imports and a prediction never uses.

Importing a model class of transformers also imports sympy, scipy's optimisers, torch's compiler and its distributed
tensors: half of the time to the first score. Here stand-ins take the place of those modules. They are lazy, not
empty: the real module is imported as soon as something of it is called, subclassed or looked into. `isinstance` does
not need it: there is no object of a class whose module was never imported.

For these two commands only. A library must not do that to its user's process, and training compiles.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import operator
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from sdumc.files import recall, remember
from sdumc.machine import skip_teardown

log = logging.getLogger("sdumc")

_DEFERRED = (
    *("scipy.optimize", "sympy", "torch.fx.experimental.symbolic_shapes", "torch._dynamo"),
    *("torch.distributed.tensor", "torch.distributed.checkpoint"),
)
# Decorators that say something to the compiler. As long as it is not imported, a function can stay as it is.
_FOR_COMPILER = ("disable", "assume_constant_result", "allow_in_graph")
# Parts of torch that build on those: when they are imported, all has to be real.
_NEED_ALL = ("torch.utils._sympy", "torch._inductor", "torch._functorch")
_SCANNER = "transformers.utils.import_utils"
# What torch asks of sizes and truth values that may be symbolic, and the answer for plain ones.
_FOR_SYMBOLS: dict[str, Callable[[tuple], Any]] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "statically_known_true"), lambda v: v[0]),
    "sym_and": all,
    "sym_or": any,
    "sym_eq": lambda v: v[0] == v[1],
    "is_nested_int": lambda v: False,
}
_importing = False  # while transformers is imported, calls wait too: they make constants that are never used


def start_fast() -> None:
    """For a command that scores clips: import what it needs, trust models that passed their trial before, and end
    without taking the libraries apart."""
    import torch

    skip_teardown(cleanup=True)
    if not torch.cuda.is_available():  # not tried with a GPU, where starting takes longer than these imports anyway
        import_transformers()
    from sdumc.pretrained.loading import remember_passed

    remember_passed()


def import_transformers() -> None:
    """Import what all models of transformers need. Whatever goes wrong, the real modules are there afterwards."""
    global _importing
    if "transformers" in sys.modules:
        return
    importlib.import_module("torch.distributed")
    for name in _DEFERRED:
        if name not in sys.modules:
            _put(name)
    sys.meta_path.insert(0, _Finder)
    _importing = True
    try:
        importlib.import_module("transformers.modeling_utils")
        importlib.import_module("transformers.masking_utils")
    except Exception as e:
        log.debug("transformers is imported with all that it asks for: %s", e)
        use_real_modules()
    finally:
        _importing = False


def use_real_modules() -> None:
    """Take the stand-ins away, so that whoever imports those modules from now on gets the real ones."""
    with contextlib.suppress(ValueError):
        sys.meta_path.remove(_Finder)
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[name]
            parent, _, last = name.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(last) is module:
                delattr(sys.modules[parent], last)


def _put(name: str) -> None:
    module = sys.modules[name] = _StandIn(name)
    module.__spec__ = ModuleSpec(name, None)
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


class _Later:
    """Something that is made when it is first needed."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make

    def _real(self) -> Any:
        if "_value" not in vars(self):
            self._value = self._make()
        return self._value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _importing:
            return _Later(lambda: self._real()(*args, **kwargs))
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self._real(),)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self._real())

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, self._real())

    def __or__(self, other: Any) -> _Either:
        return _Either(self, other)

    def __ror__(self, other: Any) -> _Either:
        return _Either(other, self)


def _delegate(name: str) -> None:
    setattr(_Later, name, lambda self, *args: getattr(operator, name)(self._real(), *args))


for _operator in ("getitem", "contains", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "index"):
    _delegate(f"__{_operator}__")


class _Name(_Later):
    """A name in a module that is not imported yet."""

    def __init__(self, module: str, name: str):
        super().__init__(self._load)
        self._module, self._name = module, name

    def _load(self) -> Any:
        log.debug("%s is needed after all, for %s", self._module, self._name)
        use_real_modules()
        return getattr(importlib.import_module(self._module), self._name)

    def _imported(self) -> bool:
        return not isinstance(sys.modules.get(self._module, _StandIn("")), _StandIn)

    def __instancecheck__(self, value: Any) -> bool:
        return self._imported() and isinstance(value, self._real())

    def __subclasscheck__(self, kind: type) -> bool:
        return self._imported() and issubclass(kind, self._real())


class _Either:
    """``A | B`` in an annotation, where A or B waits."""

    def __init__(self, *kinds: Any):
        self._kinds = kinds

    def __call__(self) -> None:  # typing takes nothing for a type that cannot be called
        raise TypeError("a union of types cannot be called")

    def __or__(self, other: Any) -> _Either:
        return _Either(*self._kinds, other)

    def __ror__(self, other: Any) -> _Either:
        return _Either(other, *self._kinds)

    def __instancecheck__(self, value: Any) -> bool:
        return any(isinstance(value, type(None) if kind is None else kind) for kind in self._kinds)


class _StandIn(ModuleType):
    """In the place of a module, and of those below it."""

    __path__: Any = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "torch._dynamo" and name in _FOR_COMPILER:
            return _unchanged
        asked = _Name(self.__name__, name)
        if answer := _FOR_SYMBOLS.get(name):
            return lambda *values: answer(values) if _plain(values) else asked(*values)
        return asked


def _plain(values: tuple) -> bool:
    return all(_plain(v) if type(v) is tuple else type(v) in (bool, int) for v in values)


def _unchanged(function: Callable | None = None, *_args: Any, **_kwargs: Any) -> Any:
    return function if function is not None else lambda decorated: decorated


class _Finder:
    """Finds modules below a stand-in, and the module of transformers that looks through its own sources."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == _SCANNER and (spec := PathFinder.find_spec(name, path)) and spec.loader:
            execute = spec.loader.exec_module

            def with_memory(module: ModuleType) -> None:
                execute(module)
                _remember_scan(module)

            spec.loader.exec_module = with_memory  # type: ignore[method-assign]
            return spec
        if name.startswith(_NEED_ALL) and not _importing:
            log.debug("%s is needed after all", name)
            use_real_modules()
        if isinstance(sys.modules.get(name.rpartition(".")[0]), _StandIn):
            return ModuleSpec(name, cls)  # type: ignore[arg-type]
        return None

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        pass


def _remember_scan(module: ModuleType) -> None:
    """Each import of transformers reads its 3,300 source files, twice, to see which class is where."""
    scan = getattr(module, "define_import_structure", None)
    if scan is None:
        return

    def remembered(module_path: Any, prefix: str | None = None) -> dict:
        folder = Path(module_path)
        folder = folder.parent if folder.is_file() else folder
        if folder.name != "models" or "site-packages" not in folder.parts:  # sources that somebody works on
            return scan(module_path, prefix)
        newest = max(entry.stat().st_mtime_ns for entry in os.scandir(folder))
        key = [str(folder), newest, importlib.metadata.version("transformers"), prefix]
        found = recall("transformers", key)
        if found is None:
            found = [
                [sorted(needs), {k: sorted(v) for k, v in names.items()}]
                for needs, names in scan(module_path, prefix).items()
            ]
            remember("transformers", key, found)
        return {frozenset(needs): {k: set(v) for k, v in names.items()} for needs, names in found}

    module.define_import_structure = remembered  # type: ignore[attr-defined]
