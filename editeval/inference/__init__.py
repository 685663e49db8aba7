"""A model under edits, and the engine that every number comes from."""
