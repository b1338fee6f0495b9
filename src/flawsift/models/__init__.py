"""Stage 2: a trained detector with its backbone and its threshold."""
