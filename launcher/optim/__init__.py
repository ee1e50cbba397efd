"""What trains the weights: optimisers, groups of weights, and the courses of their rates."""
