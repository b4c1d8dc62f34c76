"""What tests and benchmarks share; it may import anything of the project."""
