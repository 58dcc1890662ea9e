"""Prompts as people write them: their grammar, what the text encoder makes of it at each step, and their files."""
