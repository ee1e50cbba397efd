"""The training loop, the evaluation loop and the step between them."""
