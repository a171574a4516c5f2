"""What a model remembers of its context, and in how many bytes."""
