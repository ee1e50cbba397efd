"""What a run tells: Python logging, the recorder and its sinks, the run directory's small files."""
