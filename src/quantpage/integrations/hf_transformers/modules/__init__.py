"""A model's modules, read before they run: what they compute, and what they do with a cache."""
