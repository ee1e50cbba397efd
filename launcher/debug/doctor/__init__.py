"""`launcher doctor`: what a machine, and a config on it, will let a run do; and whether a run's
first steps can be repeated bit for bit."""
