"""Where a model attends, steered at inference: marks in the prompt, evidence in the context."""
