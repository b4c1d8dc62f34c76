"""Training checkpoints: finding, reading, restoring and writing them."""
