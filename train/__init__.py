"""Training: one loop, its optimizer and schedule, and a script with a recipe for each thing that is trained."""
