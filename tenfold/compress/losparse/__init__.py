"""LoSparse: weights as low rank plus structured sparse (arXiv 2306.11222)."""
