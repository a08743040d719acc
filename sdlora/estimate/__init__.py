"""What a run will need: memory, time, disk space, and what to lower."""
