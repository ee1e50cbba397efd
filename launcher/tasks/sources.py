"""Which files are a task's own: the code that a run is made of besides the launcher and packages
that were installed. Imports no torch.

Of a task in a file, and of one in a module that stands in no package, these are the loaded modules
in its folder and below, and what it imports from the working directory around it; of
"package.module:Class" the loaded modules of its top-level package; with what these import there
later, inside a function. Of one that ships with the launcher it is its module's file alone.
Callbacks likewise.
"""

from __future__ import annotations

import ast
import functools
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Folders of Python itself and of what was installed, wherever they lie below a task's folder.
INSTALLED = ("site-packages", "dist-packages")
PYTHON = tuple(
    Path(sysconfig.get_path(name)).resolve()
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


def modules_of(name: str, found: type, builtin: Mapping[str, str]) -> list[str]:
    """The modules that a name stands for, and the class found under it: they are two where the
    named module has imported the class."""
    place, _, class_name = builtin.get(name, name).rpartition(":")
    if place.endswith(".py"):  # which may stand in packages
        stem = Path(place).stem
        loaded = sys.modules.copy()  # at once: a thread may be importing
        has = [m for m, module in loaded.items() if _holds(module, class_name, found)]
        place = next((m for m in has if m.rpartition(".")[2] == stem), stem)
    return list(dict.fromkeys([place, found.__module__]))


def _holds(module: object, name: str, found: type) -> bool:
    """Whether a module has the class under this name. It is not asked for its attributes: some are
    made on demand."""
    return getattr(module, "__dict__", {}).get(name) is found


@dataclass(frozen=True)
class Own:
    """The root of the first of some modules, and the own files of all by name: relative to that
    root, or where they do not lie below it, to the root of their own module. Sorted. With a folder
    of these files on sys.path the modules can be imported.

    `imported` are those that the modules' import statements lead to. Others are only loaded: by a
    registry that imports whatever it finds, say, or by the script that started the launcher.
    """

    root: Path
    files: dict[str, Path]
    imported: frozenset[str]


def own_files(modules: Sequence[str]) -> Own:
    """The own files of some loaded modules."""
    roots, found, imported = list[Path](), dict[str, Path](), set[str]()
    for module in modules:
        file = file_of(module)
        if file is None:
            continue
        root, files, reached = _of(module, file)
        roots.append(root)
        for path in files:
            bases = (base for base in (roots[0], root, Path.cwd()) if path.is_relative_to(base))
            base = next(bases, None)
            name = (path.relative_to(base) if base else path).as_posix()
            if found.get(name, path) != path:  # of two roots; no two modules can have one name
                name = path.as_posix()
            found[name.lstrip("/")] = path
            imported |= {name.lstrip("/")} if path in reached else set()
    root = roots[0] if roots else Path.cwd()
    return Own(root, dict(sorted(found.items())), frozenset(imported))


def _of(module: str, file: Path) -> tuple[Path, set[Path], set[Path]]:
    """The root of a module, the own files that come with it, and those of them that it imports."""
    top, *below = module.split(".")
    depth = len(below) + (file.name == "__init__.py")
    root = file.parents[min(depth, len(file.parents) - 1)]
    if top == "launcher":
        return root, {file}, {file}
    package = depth > 0
    files = {file}
    for name in list(sys.modules):  # thousands: those of torch, for most
        ours = name.partition(".")[0]
        if ours == "launcher" or name == "__main__" or (package and ours != top):
            continue
        path = file_of(name)
        if path is not None and (package or _is_own(path, root)):
            files.add(path)
    # A file beside packages of its own, as tasks/mine.py, which imports models.net.
    here = () if package or not file.is_relative_to(Path.cwd()) else (Path.cwd(),)
    roots, near = (root, *here), (root / top if package else root, *here)
    return root, _reached(files, roots, near), _reached({file}, roots, near)


def _reached(files: set[Path], roots: tuple[Path, ...], near: tuple[Path, ...]) -> set[Path]:
    """These files and, from import to import, what they import from below `near`: a module that a
    function imports is not loaded before that is called."""
    found, left = set(files), list(files)
    while left:
        imported = _imported(left.pop(), roots)
        new = {path for path in imported if any(_is_own(path, n) for n in near)} - found
        found |= new
        left += new
    return found


@functools.cache
def _imported(file: Path, roots: tuple[Path, ...]) -> frozenset[Path]:
    """The files below these roots that a file's import statements name, wherever they stand."""
    try:
        source = file.read_bytes()
    except OSError:  # not ours to read
        return frozenset()
    found: set[Path] = set()
    for dots, parts in imports(source):
        if not dots and parts[0] == "launcher":
            continue
        for base in (file.parents[dots - 1],) if dots else roots:
            for count in range(1, len(parts) + 1):  # a package's own file comes with its modules
                place = base.joinpath(*parts[:count])
                found |= {place.with_name(f"{place.name}.py"), place / "__init__.py"}
    return frozenset(path.resolve() for path in found if path.is_file())


@functools.cache
def imports(source: bytes) -> list[tuple[int, list[str]]]:
    """What a source file's import statements name, wherever they stand: how many dots come first,
    and the names between dots, what is imported from a module as the last. What cannot be parsed
    names nothing."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found: list[tuple[int, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            found += [(node.level, [*module, alias.name]) for alias in node.names]
    return found


@functools.cache
def _is_own(path: Path, folder: Path) -> bool:
    """Whether a file lies below a folder, and was not installed there."""
    if not path.is_relative_to(folder) or set(INSTALLED) & {*path.relative_to(folder).parts}:
        return False
    between = [p for p in path.parents if p.is_relative_to(folder) and p != folder]
    if any((p / "pyvenv.cfg").exists() for p in between):
        return False
    # Where Python itself lies below the folder, as in somebody's home.
    return not any(p.is_relative_to(folder) and path.is_relative_to(p) for p in PYTHON)


def file_of(module: str) -> Path | None:
    """The file of a loaded module. Its attributes are not asked for: some are made on demand."""
    file = getattr(sys.modules.get(module), "__dict__", {}).get("__file__")
    return _resolved(file) if isinstance(file, str) else None


@functools.cache
def _resolved(file: str) -> Path | None:
    """A file without links on the way to it; None where there is none."""
    folder, name = os.path.split(file)
    path = os.path.join(_folder(folder), name)
    if os.path.islink(path):
        path = os.path.realpath(path)
    return Path(path) if os.path.isfile(path) else None


@functools.cache
def _folder(path: str) -> str:
    return os.path.realpath(path)
