"""What holds for all tests."""

import signal

import pytest

# A shell that starts the tests in the background has SIGINT ignored, and every process that a test
# starts would inherit that: a Ctrl-C that the test sends would then do nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what their module makes once run in one process (`--dist loadgroup`); all
    others go to whichever process is free."""
    for item in items:
        made = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        if any(one.scope == "module" for found in made.values() for one in found):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
