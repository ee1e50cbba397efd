"""Each test stands in a folder of its own."""

from tests.cli.conftest import alone as alone
