"""Pipeline folders for ppdiffusers and programs for Paddle Inference: exports, and reading them back."""
