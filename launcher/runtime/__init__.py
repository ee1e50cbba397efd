"""What this process is: its rank, its device, its process group, its CPU budget, its seeds."""
