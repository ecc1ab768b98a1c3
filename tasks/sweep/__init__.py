"""What a sweep asks, what it found, and how that is kept."""
