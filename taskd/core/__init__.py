"""What nodes decide. Pure: events in, effects out; no I/O, clock, randomness or logging."""
