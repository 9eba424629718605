"""Times of single operators -> the time of a whole step."""
