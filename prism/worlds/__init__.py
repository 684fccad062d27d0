"""Generated worlds, in which right answers and errors are known exactly."""
