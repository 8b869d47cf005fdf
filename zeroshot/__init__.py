"""Zero-shot: class heads from prompts, data sets, classification and retrieval scores."""

if __name__ != "clipkit.zeroshot":
    raise ImportError("import clipkit.zeroshot, not zeroshot: a module has one name")
