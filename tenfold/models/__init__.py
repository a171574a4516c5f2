"""Open a model from any source, name its layers by role, export what was made."""
