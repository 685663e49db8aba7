"""What an edit is and how it is kept: deltas, and the journal on disk."""
