"""Quicker ways through a step, with the same results."""
