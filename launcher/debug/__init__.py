"""Finding out what is wrong with a run, and going back to it: replay, the debugging preset, the dry
run. Nothing of a run imports this room; it looks into runs through callbacks."""
