"""Facts to edit and text to take statistics from."""
