"""The model before it is trained: weights from elsewhere."""
