"""Proof that a package computes what its base computes."""
