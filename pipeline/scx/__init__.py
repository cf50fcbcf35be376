"""Keys and values of attention as somebody else may hold them: encoded, and attended to there."""
