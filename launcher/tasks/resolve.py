"""From TASK.NAME to a task class."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from launcher.errors import UsageError
from launcher.tasks.task import Task, overrides

# The tasks that ship. Their modules import torch where they use it, not when they are imported.
BUILTIN = {
    "bytes-lm": "launcher.tasks.bytes_lm:BytesLM",
    "digits": "launcher.tasks.digits:Digits",
    "digits-caption": "launcher.tasks.digits_caption:DigitsCaption",
    "image-list": "launcher.tasks.image_list:ImageList",
    "sine": "launcher.tasks.sine:Sine",
}


def resolve_task(name: str, search: list[Path], builtin_only: bool = False) -> type[Task] | None:
    """The class named "digits", "package.module:Class" or "path/to/file.py:Class".

    A file is sought in the folders of `search`, in order. With `builtin_only` nothing but the
    tasks that ship is imported: None for any other name. Raises UsageError where there is no such
    task, with the user's own mistake (a syntax error, say) and its line.
    """
    if builtin_only and name not in BUILTIN:
        return None
    task = resolve_class(name, BUILTIN, "task", search)
    check_methods(name, task)
    return task


def check_methods(name: str, task: type) -> None:
    """Raise UsageError where a class of this name is no task."""
    missing = [
        method
        for method in ("build_model", "build_dataset", "train_step")
        if not overrides(task, method)
    ]
    if missing:
        raise UsageError(f"{name} is no task: it lacks {', '.join(missing)}")


def resolve_class(name: str, builtin: Mapping[str, str], what: str, search: list[Path]) -> type:
    """The class of this name: one of `builtin`, "package.module:Class" or "path/to/file.py:Class".

    `what` it is to be, for messages. Raises UsageError.
    """
    place, colon, class_name = builtin.get(name, name).rpartition(":")
    if not colon or not place or not class_name:
        near = difflib.get_close_matches(name, builtin, 1)
        raise UsageError(
            f"there is no {what} {name!r}"
            + (f"; the {what}s that ship are {', '.join(builtin)}" if builtin else "")
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; a {what} of your own is package.module:Class or path/to/file.py:Class"
        )
    module = _load_file(place, what, search) if place.endswith(".py") else _import(place, what)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [k for k, v in vars(module).items() if isinstance(v, type) and v is not Task]
        near = difflib.get_close_matches(class_name, classes, 1, 0.5)
        raise UsageError(
            f"{place} has no class {class_name}" + (f" (did you mean {near[0]}?)" if near else "")
        )
    return found


def _load_file(place: str, what: str, search: list[Path]) -> ModuleType:
    for folder in search:
        path = (folder / place).resolve()
        if path.is_file():
            break
    else:
        tried = ", ".join(dict.fromkeys(str((f / place).resolve()) for f in search))
        raise UsageError(f"there is no {what} file {place} (tried {tried})")
    name, root = _module(path)
    # Registered as if these folders were on the path, so that loader workers find it, and the file
    # its neighbours, its package, and what is imported from the folder that it was named from.
    _on_path(path.parent, root, folder.resolve())
    if "." in name:
        return _of_package(name, path, place, what)
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if loaded is not None and (name in sys.stdlib_module_names or hasattr(loaded, "__path__")):
        raise UsageError(
            f"the {what} file {place} has the name of the module {name}, which it would hide from "
            "all that imports it: rename it"
        )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name)
        if loaded is not None:
            sys.modules[name] = loaded
        if isinstance(error, Exception):
            raise UsageError(f"the {what} file {place} {_told(error, str(path))}") from error
        raise
    return module


def _module(path: Path) -> tuple[str, Path]:
    """The name of a file as a module, and the folder from which it is imported under that: with the
    packages that it stands in, so that relative imports work."""
    parts, root = [path.stem], path.parent
    while (root / "__init__.py").is_file() and "." not in f"{path.stem}{root.name}":
        parts, root = [root.name, *parts], root.parent
    return ".".join(parts), root


def _of_package(name: str, path: Path, place: str, what: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"the {what} file {place} {_told(error, str(path))}") from error
    if Path(str(module.__file__)).resolve() != path:
        raise UsageError(
            f"the {what} file {place} is the module {name}, which is found in {module.__file__} "
            "instead: rename its package"
        )
    return module


def _on_path(*folders: Path) -> None:
    """Let modules be found in these folders, the first first, and then in the working directory, as
    `python -m` does."""
    here = [] if getattr(sys.flags, "safe_path", False) else [Path.cwd()]
    at = 0
    for folder in map(str, [*folders, *here]):
        if folder not in sys.path:
            sys.path.insert(at, folder)
        at = max(at, sys.path.index(folder) + 1)


def _import(place: str, what: str) -> ModuleType:
    _on_path()
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and f"{place}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is no module {place} (install it, or set PYTHONPATH)"
            ) from error
        raise UsageError(f"the {what} module {place} {_told(error, place)}") from error
    except Exception as error:
        raise UsageError(f"the {what} module {place} {_told(error, place)}") from error


def _told(error: Exception, place: str) -> str:
    """Where in the user's file an import failed, and why."""
    if isinstance(error, SyntaxError):
        return f"has a syntax error in {error.filename}:{error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename == place] or frames[-1:]
    told = f"fails in {own[-1].filename}:{own[-1].lineno}: {type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError):
        told += " (install it, or set PYTHONPATH to the folder that holds it)"
    elif isinstance(error, ImportError) and "relative import" in str(error):
        told += " (a relative import needs an __init__.py beside the file)"
    return told
