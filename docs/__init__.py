"""The pages of the project, and what writes those that can be computed (`python -m docs.generate`)."""
