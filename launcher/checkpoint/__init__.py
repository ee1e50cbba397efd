"""What a training state is, and the store that commits, keeps and finds checkpoints."""
