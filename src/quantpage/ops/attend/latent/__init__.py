"""Latent rows (MLA) on GPUs: one row a token for all query heads, the value and most of the key."""
