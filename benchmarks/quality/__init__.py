"""What quantisation and prompts do to answers."""
