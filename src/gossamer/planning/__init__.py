"""Who trains what in a round, and what it costs."""
