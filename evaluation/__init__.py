"""How good the pictures of a model are."""
