"""With which code, packages and machines a run was made: what it keeps of them in its directory."""
