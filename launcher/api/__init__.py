"""The launcher from Python: `launcher.train` and `launcher.open_run`. Torch comes when needed."""
