"""Attention for prompts and chunks, causal or full: over pages, or a 16-bit workspace of them."""
