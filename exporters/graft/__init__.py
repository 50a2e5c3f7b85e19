"""Changes to a graph: virtual tokens and fusions."""
