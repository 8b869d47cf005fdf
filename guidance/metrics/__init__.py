"""Metrics of pictures: between collections, between pairs, and of a guide over noise levels."""
