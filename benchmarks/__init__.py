"""One script per claim, ours and the peer in the same process."""
