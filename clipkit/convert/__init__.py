"""Other formats: published weights in, ours out; nothing that is read runs code."""
