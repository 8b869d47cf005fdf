"""Zero-shot: class heads from prompts, data sets, classification and retrieval scores."""
