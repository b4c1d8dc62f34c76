"""Weight files: read without executing anything, written, found, and merged from shards."""
