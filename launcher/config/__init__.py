"""What a run is: the tree of defaults, loading and overriding, checking, units. No torch."""

from yacs.config import CfgNode

from launcher.config.keys import KEYS, Key, defaults, flatten
from launcher.config.load import Config, load_config
from launcher.config.problem import ConfigError, Problem
from launcher.config.units import Duration, parse_duration, seconds

__all__ = [
    "KEYS",
    "CfgNode",
    "Config",
    "ConfigError",
    "Duration",
    "Key",
    "Problem",
    "defaults",
    "flatten",
    "load_config",
    "parse_duration",
    "seconds",
]
