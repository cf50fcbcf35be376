"""The user's end of a pipeline: remote stages joined up, and put back together after a loss."""
