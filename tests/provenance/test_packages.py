"""Which packages source files import, and their versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.provenance.packages import imported, versions_of


def distribution(folder: Path, name: str, of: str, number: str, **files: str) -> None:
    place = folder / f"{name}-{number}.dist-info"
    place.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {of}\nVersion: {number}\n"
    for file, text in {"METADATA": head, **files}.items():
        (place / file.replace("__", ".")).write_text(text)


def test_what_is_imported_anywhere() -> None:
    sources = [
        b"import os, numpy.linalg as la\nfrom . import beside\nfrom .. beside import more\n",
        b"def late():\n    from one.two import three\n    import launcher.config\n",
        b"no Python at all",
    ]
    assert imported(sources) == {"numpy", "one"}


def test_versions_by_the_names_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    distribution(new, "some_dist", "some-dist", "2.0", RECORD="pk_one/__init__.py,,\npk_two.py,,\n")
    distribution(new, "declared", "declared", "3.0", top_level__txt="pk_three\n")
    # What pip leaves of an install that it was stopped in, and one that another hides.
    distribution(new, "~ome_dist", "some-dist", "1.0", RECORD="pk_one/__init__.py,,\n")
    distribution(old, "declared", "declared", "1.0", top_level__txt="pk_three\n")
    distribution(old, "longer", "longer", "1.0", RECORD="pk_one_more/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(old))
    monkeypatch.syspath_prepend(str(new))
    assert versions_of(["pk_one", "pk_three", "mine"], {}) == {
        "declared": "3.0",
        "some-dist": "2.0",
    }
    assert versions_of(["pk_two"], {}) == {"some-dist": "2.0"}
    assert versions_of(["pk_one", "pk_three"], {"some-dist": "2.0"}) == {"declared": "3.0"}
    assert versions_of(["pk_one"], {"pk_one": "?"}) == {}
