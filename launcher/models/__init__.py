"""The model before it is trained: its weights, what is frozen until when, how it is run."""
