"""Whether a process is still the one that it was."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from launcher.runtime.member import Member
from tests.waiting import wait_until


def test_a_process_is_known_by_its_host_and_when_it_began() -> None:
    here = Member.here()
    assert here.lives() and here.is_beside()
    assert replace(here, created=0.0).lives()  # not known
    assert not replace(here, created=here.created - 60).lives()  # another of the same number
    away = replace(here, host="elsewhere")
    assert not away.lives() and not away.is_beside()
    assert not Member(here.host, -1).lives()


def test_one_that_nobody_has_waited_for_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: not Member(Member.here().host, process.pid).lives())
    process.wait()
