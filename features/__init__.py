"""From images to the batches of a training loop: reading images, extraction, formats of a feature set, and loading."""
