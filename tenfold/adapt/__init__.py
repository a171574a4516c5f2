"""Fine-tuning within a budget of trainable parameters."""
