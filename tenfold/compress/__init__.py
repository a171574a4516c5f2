"""Smaller weights: low rank plus kept rows (LoSparse)."""
