"""JSON presets, the schema of their keys, and the command lines of both loops."""
