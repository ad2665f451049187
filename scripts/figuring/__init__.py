"""Tables of the pages, made of benchmarks/results: scripts/figures.py puts them in their places."""
