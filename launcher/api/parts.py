"""The parts of a run that stand alone, for a loop of one's own; docs/library.md shows one.

Each is explained where it is defined.
"""

from launcher.checkpoint.store import CheckpointStore, Found, Retention
from launcher.config import load_config
from launcher.data.splits import Data, GlobalBatch
from launcher.edges.generators import random_state, set_random_state
from launcher.runtime.process import Runtime, end, start
from launcher.runtime.progress import Progress
from launcher.runtime.topology import Topology, read_topology
from launcher.telemetry.recorder import Recorder
from launcher.telemetry.rundir import RunDirectory
from launcher.telemetry.sinks import JsonLines
from launcher.telemetry.writer import Writer

__all__ = [
    "CheckpointStore",
    "Data",
    "Found",
    "GlobalBatch",
    "JsonLines",
    "Progress",
    "Recorder",
    "Retention",
    "RunDirectory",
    "Runtime",
    "Topology",
    "Writer",
    "end",
    "load_config",
    "random_state",
    "read_topology",
    "set_random_state",
    "start",
]
