"""What holds for all tests."""

import signal

import pytest
import torch

# A shell that starts the tests in the background has SIGINT ignored, and every process that a test
# starts would inherit that: a Ctrl-C that the test sends would then do nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist asks for the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share what their module makes once run in one process (`--dist loadgroup`); all
    others go to whichever process is free. What needs a GPU is skipped without one."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        made = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        if any(one.scope == "module" for found in made.values() for one in found):
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
