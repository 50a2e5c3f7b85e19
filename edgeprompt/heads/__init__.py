"""From hidden states to an answer: pooling, classification, tags and spans."""
