"""Stage 1: which images are probably defective, and what a person decided about them."""
