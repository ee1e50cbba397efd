"""TRAIN.SHARDS: the same bits on any number of ranks (docs/shards.md)."""
