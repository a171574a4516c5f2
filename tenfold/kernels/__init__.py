"""What must be fast: one interface each, the fastest implementation that runs."""
