"""What a run tells of itself: counters, statistics, traces."""
