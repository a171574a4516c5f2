"""Games in which a decision counts when it arrives: `trading` and `fighting`, their agents, tournaments and ratings."""
