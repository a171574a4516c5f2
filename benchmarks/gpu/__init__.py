"""What the kernels and methods cost on one large GPU, beside what it offers without them; see ``__main__``."""
