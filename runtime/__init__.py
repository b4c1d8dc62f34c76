"""The machine and the process at hand, under everything else. Standard library only."""
