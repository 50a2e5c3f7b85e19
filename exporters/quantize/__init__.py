"""Quantisation of a graph's constant weights."""
