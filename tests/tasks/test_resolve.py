"""From TASK.NAME to a class: three forms of a name, and every way one can be wrong."""

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from launcher import Task
from launcher.errors import UsageError
from launcher.tasks import BUILTIN, resolve_task
from launcher.tasks.digits import Digits

GOOD = """\
from launcher import Task

class Mine(Task):
    def build_model(self): ...
    def build_dataset(self, split): ...
    def train_step(self, model, batch): ...
    def eval_step(self, model, batch): ...
"""


@pytest.fixture(autouse=True)
def imports(tmp_path: Path) -> Iterator[None]:
    """Modules in `tmp_path` can be imported, and are forgotten after the test."""
    known = set(sys.modules)
    with patch.object(sys, "path", [str(tmp_path), *sys.path]):
        yield
    for name in sys.modules.keys() - known:
        if name.startswith(("my", "neighbour")):
            del sys.modules[name]


def write(folder: Path, text: str = GOOD, name: str = "mytask.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def folder_of(task: type[Task] | None) -> str:
    """Where the task's code stands."""
    assert task is not None
    return Path(task.train_step.__code__.co_filename).parent.name


def refusal(name: str, *search: Path) -> str:
    with pytest.raises(UsageError) as caught:
        resolve_task(name, list(search))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("builtin_only", [False, True])
def test_built_in(builtin_only: bool) -> None:
    assert resolve_task("digits", [], builtin_only) is Digits


@pytest.mark.parametrize("name", ["mytask.py:Mine", "mytask:Mine", "mytask.py:Absent", "", "digit"])
def test_builtin_only_imports_nothing_else(tmp_path: Path, name: str) -> None:
    write(tmp_path, "raise SystemExit('imported')")
    assert resolve_task(name, [tmp_path], builtin_only=True) is None
    assert "mytask" not in sys.modules


@pytest.mark.parametrize("name", ["mytask:Mine", "mypackage.inner.mytask:Mine"])
def test_module(tmp_path: Path, name: str) -> None:
    module = name.partition(":")[0]
    write(tmp_path / Path(*module.split(".")[:-1]))
    task = resolve_task(name, [])
    assert task is not None and task.__module__ == module


def test_file_and_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "src", "VALUE = 3", "neighbour.py")
    write(tmp_path / "src", "from neighbour import VALUE\n" + GOOD)
    task = resolve_task("src/mytask.py:Mine", [tmp_path])
    assert task is not None
    # Loader workers that are not forked find the class by its module's name.
    assert getattr(sys.modules[task.__module__], task.__name__) is task
    assert resolve_task("src/mytask.py:Mine", [tmp_path]) is task


RELATIVE = "from .myneighbour import VALUE\n" + GOOD


def test_a_file_in_a_package_imports_relatively(tmp_path: Path) -> None:
    """Under one name: what imports it as a member of its package finds the same class."""
    for name in ("mypack/__init__.py", "mypack/inner/__init__.py"):
        write(tmp_path / name.rpartition("/")[0], "", "__init__.py")
    write(tmp_path / "mypack/inner", "VALUE = 3", "myneighbour.py")
    write(tmp_path / "mypack/inner", RELATIVE)
    task = resolve_task("mypack/inner/mytask.py:Mine", [tmp_path])
    assert task is not None and task.__module__ == "mypack.inner.mytask"
    assert resolve_task("mypack.inner.mytask:Mine", []) is task


def test_a_relative_import_without_a_package_is_told_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "src", RELATIVE)
    assert "needs an __init__.py beside the file" in refusal("src/mytask.py:Mine", tmp_path)


def test_a_package_that_is_found_elsewhere_is_told(tmp_path: Path) -> None:
    for folder in ("a/mypack", "b/mypack"):
        write(tmp_path / folder, "", "__init__.py")
        write(tmp_path / folder)
    assert resolve_task("mypack/mytask.py:Mine", [tmp_path / "a"]) is not None
    message = refusal("mypack/mytask.py:Mine", tmp_path / "b")
    assert "mypack.mytask" in message and f"{tmp_path}/a/mypack/mytask.py" in message


@pytest.mark.parametrize("name", ["mynets", "mylib.deep"])
def test_imports_from_the_folder_that_the_file_was_named_from(tmp_path: Path, name: str) -> None:
    """As from a repository's root: tasks/mytask.py imports what lies beside tasks/."""
    write(tmp_path / "repo" / Path(*name.split(".")), "VALUE = 3", "myneighbour.py")
    write(tmp_path / "repo/tasks", f"from {name}.myneighbour import VALUE\n" + GOOD)
    assert resolve_task("tasks/mytask.py:Mine", [tmp_path / "repo"]) is not None


def test_modules_are_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/system/test_starts.py has the commands, of which some put another folder there."""
    write(tmp_path / "repo")
    monkeypatch.chdir(tmp_path / "repo")
    assert resolve_task("mytask:Mine", []) is not None


@pytest.mark.parametrize("name", ["random", "yacs"])
def test_a_file_that_would_hide_a_module_in_use_is_refused(tmp_path: Path, name: str) -> None:
    module = sys.modules[name]
    write(tmp_path, name=f"{name}.py")
    assert f"the module {name}, which it would hide" in refusal(f"{name}.py:Mine", tmp_path)
    assert sys.modules[name] is module


@pytest.mark.parametrize(("written", "found"), [("ab", "a"), ("b", "b"), ("a", "a")])
def test_folders_are_searched_in_order(tmp_path: Path, written: str, found: str) -> None:
    for folder in written:
        write(tmp_path / folder)
    assert folder_of(resolve_task("mytask.py:Mine", [tmp_path / "a", tmp_path / "b"])) == found


@pytest.mark.parametrize("name", ["{folder}/mytask.py:Mine", "{tmp_path}/{folder}/mytask.py:Mine"])
def test_two_files_of_one_name_are_two_tasks(tmp_path: Path, name: str) -> None:
    for folder in "ab":
        write(tmp_path / folder)
    names = [name.format(tmp_path=tmp_path, folder=folder) for folder in "ab"]
    assert [folder_of(resolve_task(name, [tmp_path])) for name in names] == ["a", "b"]


def test_missing_file_names_where_it_was_sought(tmp_path: Path) -> None:
    message = refusal("mytask.py:Mine", tmp_path / "a", tmp_path)
    assert "there is no task file mytask.py" in message
    assert f"{tmp_path}/a/mytask.py, {tmp_path}/mytask.py" in message


@pytest.mark.parametrize("form", ["mytask.py:Mine", "mytask:Mine"], ids=["file", "module"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ndef broken(:\n", "has a syntax error in {path}:2: "),
        ("x = 1\n\nimport no_such_package_at_all\n", "{path}:3: ModuleNotFoundError: "),
        ("\nx = 1 / 0\n", "{path}:2: ZeroDivisionError: division by zero"),
        ("from launcher import Nothing\n", "{path}:1: ImportError: "),
    ],
    ids=["syntax error", "missing import", "exception", "missing name"],
)
def test_the_users_mistake_and_its_line_are_told(
    tmp_path: Path, form: str, text: str, told: str
) -> None:
    path = write(tmp_path, text)
    message = refusal(form, tmp_path)
    assert told.format(path=path) in message
    assert "mytask" not in sys.modules
    path.write_text(GOOD)
    assert resolve_task("mytask.py:Mine", [tmp_path]) is not None


def test_a_mistake_in_a_neighbour_names_the_line_that_imports_it(tmp_path: Path) -> None:
    write(tmp_path, "1 / 0", "neighbour.py")
    path = write(tmp_path, "import sys\nimport neighbour\n")
    assert f"{path}:2: ZeroDivisionError" in refusal("mytask.py:Mine", tmp_path)


def test_a_module_whose_missing_import_begins_its_own_name(tmp_path: Path) -> None:
    """`mylib_task` is there; `mylib`, which it imports, is not."""
    write(tmp_path, "import mylib\n", "mylib_task.py")
    message = refusal("mylib_task:Mine")
    assert "No module named 'mylib'" in message and "mylib_task.py:1" in message


LACKS = "mytask.py:Mine is no task: it lacks"
METHODS = "build_model, build_dataset, train_step"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("mytask.py:Mime", GOOD, "mytask.py has no class Mime (did you mean Mine?)"),
        ("mytask.py:Zebra", GOOD, "mytask.py has no class Zebra"),
        ("mytask.py:VALUE", GOOD + "VALUE = 3", "mytask.py has no class VALUE"),
        ("mynothing:Mine", GOOD, "there is no module mynothing (install it, or set PYTHONPATH)"),
        ("my.inner:Mine", GOOD, "there is no module my.inner (install it, or set PYTHONPATH)"),
        ("mytask.py:Mine", GOOD.replace("train_step", "train"), f"{LACKS} train_step"),
        ("mytask.py:Mine", "class Mine: pass", f"{LACKS} {METHODS}"),
        (
            "mytask.py:Mine",
            "import launcher\nclass Mine(launcher.Task): pass",
            f"{LACKS} {METHODS}",
        ),
    ],
)
def test_what_is_missing_is_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    write(tmp_path, text)
    assert refusal(name, tmp_path) == told


@pytest.mark.parametrize("name", ["", "digit", "mytask.py", "mytask", ":Mine", "mytask:", "a b"])
def test_a_name_that_is_none(name: str) -> None:
    message = refusal(name)
    assert all(task in message for task in BUILTIN)
    assert "package.module:Class" in message and "path/to/file.py:Class" in message
    assert ("did you mean digits?" in message) is (name == "digit")
