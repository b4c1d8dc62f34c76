"""Data, sharded and tensor parallelism: who holds what, on GPUs and with gloo on CPUs, and what memory it takes."""
