"""Reading runs back, finished or live: imports no torch, and writes nothing into a run."""
