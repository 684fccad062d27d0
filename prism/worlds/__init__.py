"""Generated worlds, whose right answers and errors are known exactly."""
