"""FPX: the precision of every layer, chosen for what the model loses by it (Kang et al. 2025, arXiv 2505.19481)."""
