"""Soft prompts: their file, template and verbalizer, and the registry that a runtime serves from."""
