"""Prompts scored on data."""
