"""Versions of the code read back, and what differs between them."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.provenance.kept import changes, contents, digest, versions


def keep(run: Path, name: str, number: int, **files: bytes) -> Path:
    folder = run / "code" / name
    (folder / "files").mkdir(parents=True)
    for file, content in files.items():
        (folder / "files" / file).write_bytes(content)
    listed = {file: {"sha256": digest(content)} for file, content in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"number": number, "files": listed}))
    return folder


def test_the_order_is_that_in_which_they_were_written(tmp_path: Path) -> None:
    """A run may go back to an earlier step. What cannot be read is left out."""
    for number, name in enumerate(("step_0", "step_9", "step_3", "step_3-2"), 1):
        keep(tmp_path, name, number)
    (keep(tmp_path, "step_4", 9) / "manifest.json").write_text("{")
    (keep(tmp_path, "step_5", 9) / "manifest.json").unlink()
    found = [version.name for version in versions(tmp_path)]
    assert found == ["step_0", "step_9", "step_3", "step_3-2"]
    assert versions(tmp_path / "none") == []


def test_changes(tmp_path: Path) -> None:
    """Of an empty file, of one without a last line feed, of one that was not kept: nothing is told
    of lines that are not known."""
    keep(tmp_path, "step_0", 1, empty=b"", end=b"a\nb\n", gone=b"x\n", large=b"1", same=b"s")
    keep(tmp_path, "step_1", 2, empty=b"y\n", end=b"a\nb", new=b"z\n", large=b"2", same=b"s")
    (tmp_path / "code/step_0/files/large").unlink()
    found = changes(*map(contents, versions(tmp_path)))
    assert [str(change) for change in found] == [
        "empty +1 -0",
        "end +1 -1",
        "gone +0 -1 (gone)",
        "large (changed; it was too large to keep)",
        "new +1 -0 (new)",
    ]
    assert list(found[3].hunks()) == []
    assert list(found[1].hunks()) == [
        ["@@ -1,2 +1,2 @@", " a", "-b", "+b  (no line feed at the end)"]
    ]
