"""From a data set to batches on a device: one global order, each rank's part of it, loaders."""
