"""Data: images and captions in, batches out."""
