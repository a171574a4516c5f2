"""One reader from files and hub ids to typed rows, and what turns rows into tokens."""
