"""World 3, task processes: commands, Python handlers, HTTP calls, and what they write."""
