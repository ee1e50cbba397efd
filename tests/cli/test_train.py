"""What `launcher train` refuses before anything is made."""

import os
import tempfile
from pathlib import Path

import pytest

from launcher.cli.train import check_writable
from launcher.errors import UsageError


@pytest.mark.parametrize("name", ["new", "new/er/still", "there"])
def test_a_writable_place_is_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_writable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["file", "file/run", "file/run/deeper", "/proc/run", "/proc/sys/a/b", "n" * 300]
)
def test_an_impossible_place_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="OUTPUT_DIR") as caught:
        check_writable(tmp_path / name)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert (tmp_path / "file").is_file()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root alone changes its user")
@pytest.mark.parametrize("mode", [0o755, 0o700], ids=["not writable", "not readable"])
def test_a_place_of_another_user_is_told(mode: int) -> None:
    # pytest's own folders are closed to other users, so this one lies elsewhere.
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, mode)
        try:
            os.seteuid(65534)
            with pytest.raises(UsageError, match="OUTPUT_DIR"):
                check_writable(Path(place) / "run")
        finally:
            os.seteuid(0)
