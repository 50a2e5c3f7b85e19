"""A package on disk: manifest, tokenizer, files that appear whole or not at all."""
