"""Attention under interval masks: a planner lists key tiles, a kernel visits them."""
