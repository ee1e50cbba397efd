"""Sweeps: the points between which a config varies, and the files that run them. No torch."""
