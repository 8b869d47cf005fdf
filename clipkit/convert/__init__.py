"""Import of published weights and export of ours; nothing that is read runs code."""
