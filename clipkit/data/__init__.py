"""Data: sources, packs of webdataset shards, image decoding and augmentation, data loader."""
