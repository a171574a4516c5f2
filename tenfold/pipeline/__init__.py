"""Recipe -> stages -> run folder, resumable at the stage and step where it stopped."""
