"""Whether the work goes on: stop requests, hangs, failures; alone ends a rank."""
