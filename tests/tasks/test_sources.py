"""Which files are a task's own: of a file with neighbours, of a package, of a task that ships."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.tasks.resolve import BUILTIN, resolve_class
from launcher.tasks.sources import modules_of, own_files


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No module of one test is loaded in the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, **files: str) -> Path:
    """Files by name, `__` for the slash and INIT for __init__."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/").replace("INIT", "__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def own(name: str, search: Path) -> tuple[Path, list[str]]:
    found = resolve_class(name, BUILTIN, "task", [search])
    own = own_files(modules_of(name, found, BUILTIN))
    assert all((own.root / one).resolve() == path for one, path in own.files.items())
    return own.root, list(own.files)


def test_of_a_file(tmp_path: Path) -> None:
    """It and what it imports from its folder and below: at once, from an import's import, and where
    a function imports it. What nobody imports is not its own."""
    write(
        tmp_path,
        src_mine="import src_near\nimport json\n\nclass Mine:\n    def step(self):\n"
        "        from src_below import src_late\n",
        src_near="from src_below import src_deep\n",
        src_below__src_deep="X = 1\n",
        src_below__src_late="from . import src_last\n",
        src_below__src_last="Y = 2\n",
        src_unused="",
    )
    root, names = own("src_mine.py:Mine", tmp_path)
    assert root == tmp_path
    below = [f"src_below/src_{name}.py" for name in ("deep", "last", "late")]
    assert names == [*below, "src_mine.py", "src_near.py"]


def test_what_is_installed_below_a_tasks_folder_is_left_out(tmp_path: Path) -> None:
    """Virtual environments, site-packages, and the launcher itself."""
    write(
        tmp_path,
        src_mine="import src_env, src_site, launcher\n\nclass Mine: ...\n",
        env__lib__src_env="",
        site_packages__src_site="",
    )
    (tmp_path / "env/pyvenv.cfg").touch()
    (tmp_path / "site_packages").rename(tmp_path / "site-packages")
    sys.path[:0] = [str(tmp_path / "env/lib"), str(tmp_path / "site-packages")]
    assert own("src_mine.py:Mine", tmp_path)[1] == ["src_mine.py"]
    assert "src_env" in sys.modules and "src_site" in sys.modules


def test_of_a_package(tmp_path: Path) -> None:
    """Its loaded modules, named from the folder that holds it; another package of that folder is
    not its own."""
    write(
        tmp_path,
        srcpkg__INIT="",
        srcpkg__tasks__mine="import srcother\nfrom srcpkg import near\n\nclass Mine: ...\n",
        srcpkg__near="",
        srcpkg__unused="",
        srcother__INIT="",
    )
    sys.path.insert(0, str(tmp_path))
    root, names = own("srcpkg.tasks.mine:Mine", tmp_path)
    assert root == tmp_path
    assert names == ["srcpkg/__init__.py", "srcpkg/near.py", "srcpkg/tasks/mine.py"]


def test_of_a_file_beside_packages_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tasks/mine.py and its neighbour, and what both import from the repository's root; not what
    lies there besides, nor the launcher, were it a checkout."""
    write(
        tmp_path,
        src_tasks__src_mine="import launcher\nimport src_near\n\nclass Mine: ...\n",
        src_tasks__src_near="from src_nets import src_net\n",
        src_nets__src_net="from . import src_block\n",
        src_nets__src_block="",
        src_nets__src_other="",
        launcher__INIT="",
    )
    monkeypatch.chdir(tmp_path)
    found = resolve_class("src_tasks/src_mine.py:Mine", {}, "task", [tmp_path])
    kept = own_files(modules_of("src_tasks/src_mine.py:Mine", found, {}))
    nets = [f"src_nets/src_{name}.py" for name in ("block", "net")]
    assert list(kept.files) == ["src_mine.py", "src_near.py", *nets]
    assert kept.imported == set(kept.files) and kept.root == tmp_path / "src_tasks"
    # With these files alone in a folder, as `launcher replay --code run` has them, it imports.
    for name, path in kept.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path / "copy")
    for name in [name for name in sys.modules if name.startswith("src_")]:
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.startswith(str(tmp_path))])
    again = resolve_class("src_mine.py:Mine", {}, "task", [tmp_path / "copy"])
    assert again is not found
    net = sys.modules["src_nets.src_net"].__file__
    assert net == str(tmp_path / "copy/src_nets/src_net.py")


def test_of_a_file_in_a_package(tmp_path: Path) -> None:
    """Under the module's full name, as of "package.module:Class"."""
    write(
        tmp_path,
        src_pack__INIT="",
        src_pack__src_mine="from .src_near import Mine\n",
        src_pack__src_near="class Mine: ...\n",
    )
    found = resolve_class("src_pack/src_mine.py:Mine", {}, "task", [tmp_path])
    modules = modules_of("src_pack/src_mine.py:Mine", found, {})
    assert modules == ["src_pack.src_mine", "src_pack.src_near"]
    own = own_files(modules)
    names = [f"src_pack/{name}.py" for name in ("__init__", "src_mine", "src_near")]
    assert (own.root, list(own.files)) == (tmp_path, names)


def test_of_a_task_that_ships(tmp_path: Path) -> None:
    assert own("sine", tmp_path)[1] == ["launcher/tasks/sine.py"]


def test_of_a_class_that_the_named_file_has_imported(tmp_path: Path) -> None:
    """The file that TASK.NAME names counts too; a callback in another folder has its own root."""
    folder = tmp_path / "a"
    write(folder, src_named="from src_lib.made import Mine\n")
    write(folder, src_lib__made="class Mine: ...\n")
    assert own("src_named.py:Mine", folder)[1] == ["src_lib/made.py", "src_named.py"]
    write(tmp_path / "b", src_callback="class Called: ...\n")
    called = resolve_class("src_callback.py:Called", {}, "callback", [tmp_path / "b"])
    modules = ["src_named", *modules_of("src_callback.py:Called", called, {})]
    found = own_files(modules)
    assert found.root == folder
    assert found.files["src_callback.py"] == tmp_path / "b/src_callback.py"


def test_while_something_else_imports(tmp_path: Path) -> None:
    # As a thread may that makes its way between any two lines: here what tidies up memory does.
    (tmp_path / "src_busy.py").write_text("class Mine:\n    pass\n")
    name = "src_busy.py:Mine"
    found = resolve_class(name, {}, "task", [tmp_path])
    added: list[str] = []

    def imports(phase: str, info: dict[str, int]) -> None:
        added.append(f"src_busy_{len(added)}")
        sys.modules[added[-1]] = sys

    before = gc.get_threshold()
    gc.callbacks.append(imports)
    gc.set_threshold(1)
    try:
        modules = modules_of(name, found, {})
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(imports)
        for module in added:
            del sys.modules[module]
    assert added and modules == ["src_busy"]


def test_what_is_loaded_but_not_imported(tmp_path: Path) -> None:
    """By a registry that imports what it finds, say: its own, and known to be so."""
    write(
        tmp_path,
        src_mine="import src_near\nimport importlib\nimportlib.import_module('src_found')\n\n"
        "class Mine: ...\n",
        src_near="",
        src_found="import src_further\n",
        src_further="",
    )
    resolve_class("src_mine.py:Mine", {}, "task", [tmp_path])
    found = own_files(["src_mine"])
    assert list(found.files) == [f"src_{n}.py" for n in ("found", "further", "mine", "near")]
    assert found.imported == {"src_mine.py", "src_near.py"}
