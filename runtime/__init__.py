"""What stands under everything else: the machine at hand. Standard library only."""
