"""Learning from preferences: which of two answers is better, and which labels to trust."""
