"""Training and evaluation: everything around a task."""
