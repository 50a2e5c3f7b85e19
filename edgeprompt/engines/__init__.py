"""One engine per architecture, and what they share."""
