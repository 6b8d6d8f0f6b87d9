"""What a cache of the source's keys and values costs in quality, and what it gains in bytes and seconds."""
