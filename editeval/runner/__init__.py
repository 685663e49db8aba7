"""The run: walking a trajectory, its results on disk, and those who watch."""
