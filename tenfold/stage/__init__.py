"""What a stage is given, what it keeps and what it reports; torch-free."""
