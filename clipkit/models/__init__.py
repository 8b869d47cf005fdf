"""CLIP: its towers, its tokenizer, and trained ones to load."""
