"""What watches over a run: stopping, hanging, numbers that are not finite, and dumps of bad steps."""
