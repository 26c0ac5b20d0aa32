"""What a run will need and how fast it may go, before any GPU is asked for."""
