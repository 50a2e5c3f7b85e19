"""Bases of true published sizes: random checkpoints, and what an export of each takes."""
