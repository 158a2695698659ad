"""Classes as their source says, whatever has been put into them since they were imported.

Engines exchange functions in modules (``modeling_llama.apply_rotary_pos_emb``), classes in modules
(``modeling_llama.LlamaRMSNorm``) and methods of classes (``LlamaForCausalLM.forward``). The source
is executed once more, into a module of another name, and what it imports from other modeling files
comes from fresh copies, too. Nothing that was imported before changes.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

SUFFIX = "__plain"
"""Behind the names of modules that were executed again."""


class FreshSources:
    """Modules executed again, each at most once.

    Attributes:
        patched: names of what was found exchanged in library modules, which were executed again,
            too.
    """

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {}
        self.patched: list[str] = []
        self._checked: set[str] = set()

    def twin(self, kind: type) -> Any:
        """The class of ``kind``'s name in a fresh copy of its module; ``kind`` if that has none."""
        value: Any = self.module(kind.__module__.removesuffix(SUFFIX))
        for part in kind.__qualname__.split("."):
            value = getattr(value, part, None)
        return kind if value is None else value

    def module(self, name: str) -> ModuleType:
        """The fresh copy of the imported module ``name``."""
        if name not in self.modules:
            self._execute(name)
        return self.modules[name]

    def _execute(self, name: str) -> None:
        original = importlib.import_module(name)
        if original.__file__ is None or not original.__file__.endswith(".py"):
            raise ImportError(f"{name} has no source")
        spec = importlib.util.spec_from_file_location(name + SUFFIX, original.__file__)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} has no source")
        module = importlib.util.module_from_spec(spec)
        module.__package__ = original.__package__
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._import}
        # dataclasses and transformers look for a class's module there; ``close`` takes it out
        sys.modules[spec.name] = self.modules[name] = module
        try:
            # not ``exec_module``: it would put the usual builtins in place
            exec(spec.loader.get_code(spec.name), vars(module))  # type: ignore[attr-defined]
        except BaseException:
            del sys.modules[spec.name], self.modules[name]
            raise
        for key, value in list(vars(module).items()):
            if isinstance(value, type) and hasattr(value, "_model_mapping"):
                vars(module)[key] = self._auto(value)

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        imported = builtins.__import__(name, globals, locals, fromlist, level)
        if not fromlist or not isinstance(imported, ModuleType):
            return imported
        return self.module(imported.__name__) if self._is_replaced(imported) else imported

    def _is_replaced(self, module: ModuleType) -> bool:
        name = module.__name__
        if name in self.modules or is_modeling(name):
            return True
        if name in self._checked or not name.startswith(("transformers.", "peft.")):
            return False
        self._checked.add(name)
        exchanged = list(exchanged_names(module))
        self.patched += exchanged
        return bool(exchanged) and name not in _SHARED

    def _auto(self, kind: Any) -> Any:
        """An auto class (AutoModel) whose models are of fresh classes."""
        sources = self

        def from_config(cls: Any, config: Any, **kwargs: Any) -> Any:
            mapped = cls._model_mapping[type(config)]
            mapped = mapped[0] if isinstance(mapped, tuple) else mapped
            return sources.twin(mapped)._from_config(config, **kwargs)

        method: Any = classmethod(from_config)  # type: ignore[arg-type]  # 2026-11-30: of any class
        return type(kind.__name__, (kind,), {"from_config": method})

    def close(self) -> None:
        """Take the fresh modules out of ``sys.modules``."""
        for module in self.modules.values():
            sys.modules.pop(module.__name__, None)
        capturing: Any = sys.modules.get("transformers.utils.output_capturing")
        registry = getattr(capturing, "_CAN_RECORD_REGISTRY", {})
        for key in [k for k in registry if isinstance(k, str) and f"{SUFFIX}." in k]:
            del registry[key]


@contextmanager
def fresh_sources() -> Iterator[FreshSources]:
    """``FreshSources``, closed at the end."""
    sources = FreshSources()
    try:
        yield sources
    finally:
        sources.close()


_SHARED = ("transformers.modeling_utils", "transformers.configuration_utils")
"""Modules whose classes others are tested for by ``isinstance``: these are not executed again."""


def is_modeling(name: str) -> bool:
    """Whether a module has a model's classes: ``modeling_llama``, or code of a checkpoint."""
    return name.rpartition(".")[2].startswith("modeling_") and (
        ".models." in name or name.startswith("transformers_modules.")
    )


def exchanged_names(module: ModuleType) -> Iterator[str]:
    """Functions, classes and methods of a module that are not those of its source, by name."""
    path = getattr(module, "__file__", None)
    if not path or not path.endswith(".py"):
        return
    for defined, methods in _definitions(path).items():
        value = vars(module).get(defined)
        if methods is None:
            if is_foreign(value, path):
                yield f"{module.__name__}.{defined}"
        elif isinstance(value, type):
            if value.__module__ != module.__name__ or value.__name__ != defined:
                yield f"{module.__name__}.{defined}"
                continue
            for name in methods & vars(value).keys():
                if is_foreign(vars(value)[name], path):
                    yield f"{module.__name__}.{defined}.{name}"


@functools.cache
def _definitions(path: str) -> dict[str, frozenset[str] | None]:
    """The functions of a file (None), and its classes with the names of their methods."""
    found: dict[str, frozenset[str] | None] = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = None
        elif isinstance(node, ast.ClassDef):
            methods = (n.name for n in node.body if isinstance(n, ast.FunctionDef))
            found[node.name] = frozenset(methods)
    return found


def is_foreign(function: Any, path: str) -> bool:
    """Whether a function's code, and that of all it wraps, is from another file than ``path``."""
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    if isinstance(function, property):
        function = function.fget
    if not isinstance(function, FunctionType):
        return False
    files = set(_files(function))
    return path not in files


def _files(function: FunctionType) -> Iterator[str]:
    """The files of a function, of what it wraps, and of functions in its closure."""
    seen: set[int] = set()
    rest: list[Any] = [function]
    while rest:
        each = rest.pop()
        if id(each) in seen or not isinstance(each, FunctionType | CodeType):
            continue
        seen.add(id(each))
        if isinstance(each, CodeType):
            yield each.co_filename
            continue
        yield each.__code__.co_filename
        rest.append(inspect.unwrap(each))
        for cell in each.__closure__ or ():
            try:
                rest.append(cell.cell_contents)
            except ValueError:  # an empty cell
                continue
