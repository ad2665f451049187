"""Attention for steps of few new tokens a request: split over the keys, over pages as they lie."""
