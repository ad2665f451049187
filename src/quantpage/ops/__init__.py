"""Stateless functions on views; a folder an op, the same file names in each."""
