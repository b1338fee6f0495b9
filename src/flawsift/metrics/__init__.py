"""How good scores and maps are, by the labels that training never sees."""
