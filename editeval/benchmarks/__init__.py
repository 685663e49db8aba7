"""What is asked of a model after each rung."""
