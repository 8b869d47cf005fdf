"""CLIP: image and text encoders, tokenizer, and sources of trained weights."""
