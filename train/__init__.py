"""Training: one loop, its optimizer and schedule, and a script with a recipe for each thing that is trained."""

if __name__ != "clipkit.train":
    raise ImportError("import clipkit.train, not train: a module has one name")
