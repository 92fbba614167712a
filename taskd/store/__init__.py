"""World 2, the disk: the scheduler's database and the worker's journal of outcomes."""
