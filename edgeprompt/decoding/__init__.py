"""From logits to an answer: sampling, beam search, detokenizer, strategies."""
