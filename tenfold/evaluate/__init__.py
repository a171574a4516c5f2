"""What a model is worth: one function per measurement, each with one typed result."""
