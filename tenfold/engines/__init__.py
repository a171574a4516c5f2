"""Engines: one way to ask for texts and scores, whoever computes them."""
