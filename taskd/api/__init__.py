"""World 4, local clients: HTTP and JSON on the Unix socket."""
