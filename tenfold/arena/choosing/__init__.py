"""Which agent to use, by what an arena pays."""
