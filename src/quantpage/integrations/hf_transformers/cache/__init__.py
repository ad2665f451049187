"""The cache that a Transformers model is given, layer by layer, and prompts kept for later."""
