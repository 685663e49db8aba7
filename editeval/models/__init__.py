"""The models room: where weights come from, where things are in them, and how to look inside a forward pass."""
