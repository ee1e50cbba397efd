"""Where something foreign comes in or goes out: models, gradients, optimisers, numbers, states.

What torch's protocols allow is taken, what has one plain meaning is converted, and the rest refused
by name, before the first step where it shows by then. No other room assumes anything about them.
"""
